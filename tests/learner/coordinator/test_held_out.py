"""Held-out tasks are evaluated and never trained, whatever the source of rows."""

import json

import pytest

from common.environments import EnvironmentSpec
from learner.coordinator.held_out import open_with_held_out
from learner.coordinator.rows import DataError


def a_file(tmp_path, rows, name="prompts.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def numbered(number, **more):
    return [{"prompt": f"question {index}", **more} for index in range(number)]


def prompts(tasks, numbers):
    return [json.loads(tasks.task(number).row)["prompt"] for number in numbers]


def endless():
    """A generator of 40 rows, the same in every round."""
    yield from numbered(40)


@pytest.mark.parametrize("is_finite", [True, False])
def test_tasks_taken_out_of_the_data_are_evaluated_and_never_trained(tmp_path, is_finite):
    source = a_file(tmp_path, numbered(40)) if is_finite else f"python:{__name__}:endless"
    training, held_out = open_with_held_out(source, seed=1, num_tasks=10)
    evaluated = prompts(held_out, range(10))
    trained = prompts(training, range(300))  # ten epochs
    assert len(set(evaluated)) == 10
    assert set(trained) == {row["prompt"] for row in numbered(40)} - set(evaluated)
    assert (training.are_in_memory, held_out.are_in_memory) == (is_finite, True)
    assert sorted(trained[:30]) == sorted(set(trained))  # an epoch goes through all that is left, once


def test_of_equal_prompts_none_is_trained_when_one_is_held_out(tmp_path):
    rows = [{"prompt": f"question {max(0, index - 36)}", "answer": index} for index in range(40)]
    training, held_out = open_with_held_out(a_file(tmp_path, rows), seed=1, num_tasks=3)
    evaluated = prompts(held_out, range(3))
    assert len(set(evaluated)) == 3
    assert set(prompts(training, range(100))) == {f"question {index}" for index in range(4)} - set(evaluated)


def test_what_a_file_of_its_own_evaluates_is_left_out_of_training_too(tmp_path):
    evaluated = a_file(tmp_path, [{"prompt": "question 3"}, {"prompt": "another"}], "held_out.jsonl")
    source = a_file(tmp_path, [*numbered(5), {"answer": 1, "prompt": "question 3"}])
    training, held_out = open_with_held_out(source, seed=1, num_tasks=2, evaluation_source=evaluated)
    assert sorted(prompts(held_out, range(2))) == ["another", "question 3"]
    assert set(prompts(training, range(50))) == {f"question {index}" for index in (0, 1, 2, 4)}


def test_every_evaluation_has_the_same_tasks_and_seeds(tmp_path):
    source = a_file(tmp_path, numbered(40))
    tasks = [open_with_held_out(source, seed=1, num_tasks=5) for _ in range(2)]
    assert len({repr([held_out.task(number) for number in range(5)]) for _, held_out in tasks}) == 1
    training, held_out = tasks[0]
    assert {held_out.task(number).seed for number in range(5)}.isdisjoint(training.task(n).seed for n in range(500))
    other = open_with_held_out(source, seed=2, num_tasks=5)[1]
    assert prompts(other, range(5)) != prompts(held_out, range(5))


def test_a_resume_with_other_held_out_tasks_is_noticed_by_the_name_of_what_is_trained(tmp_path):
    source = a_file(tmp_path, numbered(40))
    names = {open_with_held_out(source, seed=1, num_tasks=number)[0].name for number in (5, 6)}
    assert len(names) == 2


def test_each_of_several_environments_has_its_share_of_the_evaluation(tmp_path):
    first, second = a_file(tmp_path, numbered(40), "a.jsonl"), a_file(tmp_path, numbered(9, answer=1), "b.jsonl")
    specs = (
        EnvironmentSpec(name="a", url="python:a:b", weight=3.0, data=first),
        EnvironmentSpec(name="b", url="python:a:c", weight=1.0, data=second),
    )
    training, held_out = open_with_held_out("unused.jsonl", seed=1, num_tasks=8, specs=specs)
    environments = [held_out.task(number).environment for number in range(8)]
    assert (environments.count(0), environments.count(1)) == (6, 2)
    # A prompt that one of them evaluates is not trained by the other either.
    assert set(prompts(held_out, range(8))).isdisjoint(prompts(training, range(200)))
    with pytest.raises(DataError, match="says not which of 2 environments it is for"):
        open_with_held_out("unused.jsonl", seed=1, num_tasks=8, specs=specs, evaluation_source=first)


def test_an_environment_that_makes_its_tasks_is_evaluated_by_other_seeds():
    training, held_out = open_with_held_out("system:play", seed=1, num_tasks=3)
    seeds = {held_out.task(number).seed for number in range(3)}
    assert len(seeds) == 3
    assert seeds.isdisjoint(training.task(number).seed for number in range(1000))
    assert held_out.task(0).row == training.task(0).row


def test_fewer_prompts_than_are_to_be_evaluated_are_refused(tmp_path):
    with pytest.raises(DataError, match="5 tasks are to be evaluated, there are 3 prompts; lower evaluation_tasks"):
        open_with_held_out(a_file(tmp_path, numbered(3)), seed=1, num_tasks=5)


@pytest.mark.parametrize("is_finite", [True, False])
def test_data_of_which_nothing_is_left_to_train_is_refused(tmp_path, is_finite, monkeypatch):
    monkeypatch.setattr("learner.coordinator.held_out.MAX_SKIPPED_ROWS", 500)
    source = a_file(tmp_path, numbered(40)) if is_finite else f"python:{__name__}:endless"
    with pytest.raises(DataError, match="nothing is left to train on when 40 prompts are held out"):
        open_with_held_out(source, seed=1, num_tasks=40)
