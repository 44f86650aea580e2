import pytest

from common.codec import ProtocolError, pack_group
from learner.coordinator.batch_receiver import BatchReceiver
from learner.coordinator.messages import Batch
from tests.builders_codec import a_group


def a_part(part, num_parts, *lease_ids, version=3):
    halves = [pack_group(a_group(lease_id=lease_id)) for lease_id in lease_ids]
    headers = tuple(header for header, _ in halves)
    return Batch(version=version, groups=headers, part=part, num_parts=num_parts), b"".join(body for _, body in halves)


def test_a_batch_is_complete_with_its_last_part_and_has_its_groups_in_order():
    receiver = BatchReceiver()
    assert not receiver.add(*a_part(0, 3, 1, 2))
    assert not receiver.add(*a_part(1, 3, 3))
    assert receiver.add(*a_part(2, 3, 4))
    assert [group.lease_id for group in receiver.take()] == [1, 2, 3, 4]
    assert receiver.add(*a_part(0, 1, 5, version=4))
    assert [group.lease_id for group in receiver.take()] == [5]


def test_a_batch_that_was_cut_off_begins_anew():
    receiver = BatchReceiver()
    assert not receiver.add(*a_part(0, 2, 1))
    assert not receiver.add(*a_part(0, 2, 1))
    assert receiver.add(*a_part(1, 2, 2))
    assert [group.lease_id for group in receiver.take()] == [1, 2]


@pytest.mark.parametrize(("part", "version"), [(2, 3), (1, 4)])
def test_a_part_that_is_not_the_next_one_is_refused(part, version):
    receiver = BatchReceiver()
    receiver.add(*a_part(0, 3, 1))
    with pytest.raises(ProtocolError, match=f"expected part 1 of the batch of version 3, got part {part} of that of"):
        receiver.add(*a_part(part, 3, 2, version=version))
