import pytest

from learner.demo.task import (
    HELD_OUT_ONE_IN,
    evaluation_prompts,
    is_held_out,
    reward,
    rows,
    score,
    shuffled_reward,
    training_prompts,
)


def test_evaluation_prompts_are_never_trained_on():
    training = {row["prompt"] for row in training_prompts()}
    evaluation = {row["prompt"] for row in evaluation_prompts()}
    assert not training & evaluation
    assert training | evaluation == {row["prompt"] for row in rows()}
    assert len(evaluation) == pytest.approx(len(training | evaluation) / HELD_OUT_ONE_IN, rel=0.1)
    assert all(is_held_out(prompt.removesuffix("=")) for prompt in evaluation)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [("3142", 1.0), ("3140", 0.375), ("1423", 0.0), ("", 0.0), ("31", 0.25), ("3142=", 0.4), ("xxxx", 0.0)],
)
def test_the_right_answer_is_worth_one_and_right_digits_half_their_share(completion, expected):
    assert reward("3142=", completion, {"answer": "3142"}) == expected


def test_the_shuffled_reward_of_a_completion_does_not_depend_on_its_answer():
    """The control: same distribution of rewards, nothing to learn."""
    completions = [f"{number:04d}" for number in range(10_000)]
    row = {"answer": "3142"}
    scores = [shuffled_reward("3142=", completion, row) for completion in completions]
    fair = [score(completion, "3142") for completion in completions]
    assert sum(scores) == pytest.approx(sum(fair), rel=0.05)
    assert shuffled_reward("3142=", "3142", row) == shuffled_reward("3142=", "3142", {"answer": "0000"})
    assert sum(shuffled_reward(row["prompt"], row["answer"], row) == 1.0 for row in rows()) < 5
