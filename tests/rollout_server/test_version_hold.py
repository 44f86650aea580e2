from common.snapshot import NO_VERSION
from rollout_server.version_hold import VersionHold


def test_nothing_is_held_before_the_learner_wants_it():
    hold = VersionHold()
    assert not any(hold.holds(version) for version in (NO_VERSION, 0, 1))


def test_the_versions_of_a_range_are_held_and_no_others():
    hold = VersionHold()
    hold.set(3, 5)
    assert [version for version in range(-1, 8) if hold.holds(version)] == [3, 4, 5]
    hold.set(0, NO_VERSION)
    assert not hold.holds(3)


def test_a_version_that_was_held_long_enough_is_not_held_again_but_others_are():
    hold = VersionHold()
    hold.set(3, 5)
    hold.run_out(3)
    hold.set(3, 3)
    assert not hold.holds(3)
    hold.set(3, 5)
    assert hold.holds(4)
    hold.clear()
    hold.set(3, 3)
    assert hold.holds(3)  # of another run
