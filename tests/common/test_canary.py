import numpy as np
import pytest

from common.canary import NUM_TOKENS, Canary, canary_prompt, make_canary


def test_the_prompt_is_the_same_in_every_run_and_from_all_over_the_vocabulary():
    prompt = canary_prompt(50_000, 4096)
    assert prompt.tolist() == canary_prompt(50_000, 4096).tolist()
    assert prompt.size == NUM_TOKENS
    assert prompt.min() >= 0
    assert np.diff(np.sort(prompt)).max() < 50_000 / 4


@pytest.mark.parametrize(("max_model_len", "num_tokens"), [(2, None), (3, 2), (10, 9), (65, 64), (1 << 20, 64)])
def test_the_prompt_leaves_room_for_a_token_and_is_none_where_nothing_is_left(max_model_len, num_tokens):
    prompt = canary_prompt(100, max_model_len)
    assert (prompt.size if prompt is not None else None) == num_tokens


def test_the_distance_is_the_mean_of_the_absolute_differences():
    canary = make_canary([1, 2, 3], np.array([-1.0, -2.0], np.float32), 0.1)
    assert canary.distance(np.array([-1.5, -1.0], np.float32)) == pytest.approx(0.75)
    assert canary.distance(np.array([-1.0, -2.0], np.float32)) == 0.0


@pytest.mark.parametrize("answer", [[-1.0], [-1.0, np.nan], [-np.inf, -1.0], [-1.0, -2.0, -3.0]])
def test_an_answer_that_is_no_answer_is_infinitely_far_away(answer):
    canary = make_canary([1, 2, 3], np.array([-1.0, -2.0], np.float32), 0.1)
    assert canary.distance(np.array(answer, np.float32)) == float("inf")


def test_log_probabilities_that_are_not_finite_are_no_canary():
    assert make_canary([1, 2, 3], np.array([-1.0, np.nan], np.float32), 0.1) is None


def test_rounding_above_zero_is_taken_for_zero():
    assert make_canary([1, 2], np.array([1e-7], np.float32), 0.1) == Canary(
        token_ids=(1, 2), logprobs=(0.0,), tolerance=0.1
    )
