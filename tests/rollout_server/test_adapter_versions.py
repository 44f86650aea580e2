"""Which versions of an adapter are held, and for how long."""

import pytest

from common.snapshot import NO_VERSION
from rollout_server.adapter_versions import AdapterVersions, HeldAdapter


def load(versions: AdapterVersions, version: int) -> HeldAdapter:
    versions.removed(versions.unneeded())
    adapter = versions.begin_load(version, "/somewhere")
    versions.loaded(adapter)
    return adapter


def test_a_version_is_needed_while_it_is_the_newest_or_a_request_began_with_it():
    versions = AdapterVersions(3)
    first = load(versions, 5)
    first.num_requests += 1
    second = load(versions, 6)
    assert (versions.newest, versions.unneeded(), versions.oldest_in_use()) == (second, [], 5)
    third = load(versions, 7)
    assert versions.unneeded() == [second]
    first.num_requests -= 1
    assert versions.unneeded() == [first, second]
    assert (versions.newest, versions.oldest_in_use()) == (third, NO_VERSION)


def test_there_is_room_once_the_last_request_of_a_version_has_ended():
    versions = AdapterVersions(2)
    load(versions, 0).num_requests += 1
    newest = load(versions, 1)
    assert not versions.has_room
    with pytest.raises(OverflowError, match="no room for version 2 in <AdapterVersions up to 2: 0 by 1, 1 by 0>"):
        load(versions, 2)
    newest.num_requests += 1
    versions._held[0].num_requests -= 1
    assert versions.has_room
    assert load(versions, 2).version == 2


def test_a_load_that_failed_takes_its_place_until_the_next_and_is_not_used():
    versions = AdapterVersions(3)
    good = load(versions, 0)
    failed = versions.begin_load(1, "/somewhere")
    assert (versions.newest, versions.unneeded()) == (good, [failed])


def test_a_version_that_comes_again_is_another_adapter():
    versions = AdapterVersions(2)
    assert load(versions, 3).name != load(versions, 3).name


def test_once_retired_no_version_is_the_newest_and_all_go_when_their_requests_have_ended():
    versions = AdapterVersions(2)
    held = load(versions, 0)
    held.num_requests += 1
    versions.retire()
    assert (versions.newest, versions.num_requests, versions.unneeded()) == (None, 1, [])
    held.num_requests -= 1
    assert (versions.num_requests, versions.unneeded()) == (0, [held])


def test_one_place_is_not_enough():
    with pytest.raises(ValueError, match="at least 2 adapters, one that is used and the next; got 1"):
        AdapterVersions(1)
