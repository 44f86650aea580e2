"""Units: trajectories whose first tokens are computed once, found by their tokens alone."""

import numpy as np
import pytest

from learner.shared_prompts import Unit, find_units, saves_enough

PROMPT, OTHER = [1] * 8, [2] * 8


def ids(*trajectories: list[int]) -> list[np.ndarray]:
    return [np.array(each) for each in trajectories]


def test_trajectories_that_begin_alike_are_a_unit_and_others_are_not():
    found = find_units(ids([*PROMPT, 5], [*PROMPT, 6, 7], [*OTHER, 5], [*OTHER, 6], [3, 4]))
    assert found == [Unit(0, 2, 8), Unit(2, 2, 8), Unit(4, 1, 0)]
    assert [unit.saved for unit in found] == [8, 8, 0]


def test_answers_that_happen_to_begin_alike_are_no_unit_of_their_own():
    answers = ([5], [7, 8, 1], [7, 8, 2], [6], [7])
    assert find_units(ids(*([*PROMPT, *answer] for answer in answers))) == [Unit(0, 5, 8)]


def test_groups_that_begin_with_the_same_instructions_stay_apart_where_their_prompts_go_on():
    instructions = [9] * 4
    groups = [[*instructions, *prompt, answer] for prompt in (PROMPT, OTHER) for answer in (5, 6, 7)]
    assert find_units(ids(*groups)) == [Unit(0, 3, 12), Unit(3, 3, 12)]


def test_what_is_left_of_a_group_does_not_take_the_next_one_along():
    assert find_units(ids([9, *PROMPT], [9, *OTHER, 5], [9, *OTHER, 6])) == [Unit(0, 1, 0), Unit(1, 2, 9)]


def test_a_trajectory_may_be_the_beginning_of_another_or_the_same():
    assert find_units(ids(PROMPT, [*PROMPT, 5], PROMPT)) == [Unit(0, 3, 8)]
    assert find_units(ids(PROMPT, PROMPT)) == [Unit(0, 2, 8)]


def test_a_first_token_that_all_texts_have_is_not_worth_a_unit():
    assert find_units(ids([0, *range(5, 90)], [0, *range(6, 91)])) == [Unit(0, 1, 0), Unit(1, 1, 0)]


def test_answers_whose_mask_would_be_too_large_are_computed_each_with_its_prompt():
    prompt = [9] * 1000
    long, short = ([[*prompt, *[word] * length] for word in (5, 6)] for length in (8000, 7000))
    assert find_units(ids(*long)) == [Unit(0, 1, 0), Unit(1, 1, 0)]
    assert find_units(ids(*short)) == [Unit(0, 2, 1000)]


def test_there_may_be_one_trajectory_or_none():
    assert find_units(ids(PROMPT)) == [Unit(0, 1, 0)]
    assert find_units([]) == []


@pytest.mark.parametrize("seed", range(20))
def test_units_are_all_trajectories_in_their_order_and_save_as_much_as_any_cut_that_keeps_groups(seed):
    rng = np.random.default_rng(seed)
    rows, groups = [], []
    for _ in range(rng.integers(1, 6)):
        prompt, count = rng.integers(0, 3, rng.integers(0, 12)), rng.integers(1, 6)
        groups.append((int(count) - 1) * len(prompt))
        rows += [np.concatenate([prompt, rng.integers(0, 3, rng.integers(0, 6))]) for _ in range(count)]
    found = find_units(rows)
    assert [index for unit in found for index in range(unit.first, unit.first + unit.count)] == list(range(len(rows)))
    for unit in found:
        members = rows[unit.first : unit.first + unit.count]
        assert all(np.array_equal(row[: unit.prefix], members[0][: unit.prefix]) for row in members)
    assert sum(unit.saved for unit in found) >= 0.8 * sum(groups)


@pytest.mark.parametrize(("row", "padded", "pays"), [(1000, 1000, False), (960, 1000, False), (900, 1000, True)])
def test_a_row_of_segments_is_taken_where_it_leaves_out_more_than_it_costs(row, padded, pays):
    assert saves_enough(row, padded) == pays
