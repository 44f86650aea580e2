import itertools

import pytest

from learner.coordinator.deadlines import Deadlines


def deadlines_of(*due, groups_per_step=2):
    deadlines = Deadlines(groups_per_step)
    for deadline in due:
        deadlines.add(deadline)
    return deadlines


@pytest.mark.parametrize(
    ("due", "version", "overfull"),
    [
        ((0, 0, 1, 1), 0, None),
        ((0, 0, 0, 1), 0, 0),
        ((0, 1, 1, 1), 0, None),
        ((1, 1, 1, 1, 1), 0, 1),
        ((0,), 1, 0),  # overdue
        ((), 5, None),
    ],
)
def test_the_first_step_is_found_by_which_more_is_due_than_can_be_trained(due, version, overfull):
    assert deadlines_of(*due).first_overfull(version, trained={}) == overfull


def test_what_is_trained_and_what_ended_counts_no_more():
    deadlines = deadlines_of(0, 0, 0)
    assert deadlines.first_overfull(0, trained={0: 1}) is None
    deadlines.remove(0)
    assert deadlines.first_overfull(0, trained={}) is None
    assert repr(deadlines) == "<Deadlines 2 by step 0>"
    assert deadlines.first_overfull(0, trained={}) is None  # asking changes nothing


def can_be_scheduled(due, version, groups_per_step):
    """By trying every order: all are trained, groups_per_step at a step, none after its deadline."""
    return any(
        all(deadline >= version + place // groups_per_step for place, deadline in enumerate(order))
        for order in itertools.permutations(due)
    )


@pytest.mark.parametrize("groups_per_step", [1, 2, 3])
def test_the_sum_rule_agrees_with_trying_every_order(groups_per_step):
    for due in itertools.combinations_with_replacement(range(4), 5):
        fits = deadlines_of(*due, groups_per_step=groups_per_step).first_overfull(1, trained={}) is None
        assert fits == can_be_scheduled(due, 1, groups_per_step), due
