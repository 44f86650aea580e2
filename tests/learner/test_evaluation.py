import itertools
import math

import pytest

from common.messages import EvaluatedEpisode
from learner.coordinator.messages import EvaluatedTask, EvaluationReport
from learner.evaluation import EVALUATION_METRICS, evaluation_of, pass_at_k, powers_up_to


@pytest.mark.parametrize("passed", range(7))
@pytest.mark.parametrize("k", range(1, 7))
def test_pass_at_k_is_the_share_of_all_choices_of_k_episodes_with_one_that_passed(passed, k):
    episodes = [index < passed for index in range(6)]
    choices = list(itertools.combinations(episodes, k))
    assert pass_at_k(6, passed, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_pass_at_k_is_unbiased():
    chance, k, n = 0.3, 3, 5
    outcomes = itertools.product([True, False], repeat=n)
    expected = sum(
        math.prod(chance if passed else 1 - chance for passed in outcome) * pass_at_k(n, sum(outcome), k)
        for outcome in outcomes
    )
    assert expected == pytest.approx(1 - (1 - chance) ** k)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)])
def test_what_cannot_be_estimated_is_refused(n, c, k):
    with pytest.raises(ValueError, match="cannot be estimated"):
        pass_at_k(n, c, k)


def test_pass_at_k_is_reported_for_powers_of_two_and_for_all_samples():
    assert [powers_up_to(number) for number in (1, 2, 3, 4, 6, 8)] == [
        [1], [1, 2], [1, 2, 3], [1, 2, 4], [1, 2, 4, 6], [1, 2, 4, 8],
    ]  # fmt: skip


def a_report(*rewards, **changes):
    tasks = tuple(
        EvaluatedTask(
            task_id=number,
            episodes=tuple(
                EvaluatedEpisode(
                    reward=reward, num_tokens=10, terminated=reward > 0, oldest_version=40, newest_version=40
                )
                for reward in group
            ),
        )
        for number, group in enumerate(rewards)
    )
    fields = {"asked_version": 40, "version": 40, "tasks": tasks, "failed": {}, "unfinished": 0}
    return EvaluationReport(**fields | changes)


def test_an_evaluation_is_over_tasks_and_says_how_sure_it_is():
    evaluation = evaluation_of(a_report([1.0, 0.0], [1.0, 1.0], [0.0, 0.0]), samples=2, pass_reward=1.0)
    assert evaluation.metrics == {
        "reward": pytest.approx(0.5),
        "reward_error": pytest.approx(0.5 / math.sqrt(3)),
        "pass_at_1": pytest.approx(0.5),
        "pass_at_2": pytest.approx(2 / 3),
        "length_mean": 10.0,
        "truncated": pytest.approx(0.5),
        "tasks": 3.0,
        "failed_tasks": 0.0,
    }
    assert str(evaluation) == "evaluation of version 40: mean reward 0.500, pass@2 0.67 (3 tasks)"


def test_greedily_there_is_one_episode_a_task():
    evaluation = evaluation_of(a_report([0.6], [1.0], failed={"bad_row": 2}), samples=1, pass_reward=0.6)
    assert str(evaluation) == "evaluation of version 40: mean reward 0.800, pass@1 1.00 (2 tasks, 2 failed)"


@pytest.mark.parametrize(
    ("report", "said"),
    [
        (
            a_report([1.0], unfinished=3, reason="it was not done within 9 s"),
            "evaluation of version 40 was given up: it was not done within 9 s",
        ),
        (
            a_report(failed={"bad_row": 2}),
            "evaluation of version 40 was given up: every task failed: {'bad_row': 2}",
        ),
    ],
)
def test_an_evaluation_of_some_tasks_only_has_no_metrics(report, said):
    evaluation = evaluation_of(report, samples=1, pass_reward=1.0)
    assert (evaluation.metrics, evaluation.is_complete, str(evaluation)) == ({}, False, said)


def test_every_metric_has_a_help_text():
    metrics = evaluation_of(a_report([1.0, 0.0]), samples=2, pass_reward=1.0).metrics
    assert {name for name in metrics if not name.startswith("pass_at_")} == EVALUATION_METRICS.keys() - {"pass_at_1"}
