"""The summary of a run says what its event logs say, also of runs that were interrupted, moved or hardly began."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import pytest

from common.lifecycle import UserError
from deploy.__main__ import main as countercurrent
from deploy.picture import busy_shares, draw, draw_reward, smooth, zoom_window
from deploy.report import describe, duration, main, summarize

Event = dict[str, Any]


def write_log(path: Path, role: str, events: Iterable[Event]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"role": role, **event}) + "\n" for event in events))


def interval(kind: str, start: float, end: float, **fields: Any) -> Event:
    return {"t": start, "t_end": end, "kind": kind, **fields}


def a_step(step: int, at: float, **values: Any) -> Event:
    defaults = {"reward": 0.5, "trained_tokens": 100.0, "staleness_histogram": {"0": 50, "1": 50}}
    return {"t": at, "kind": "step", "step": step, **defaults, **values}


def a_learner(
    directory: Path, *, lineage: int = 1, start: float = 0.0, steps: Iterable[int] = range(1, 11), **values: Any
) -> None:
    """Each step takes two seconds: one to wait and one to train."""
    events = []
    for index, step in enumerate(steps):
        at = start + 2 * index
        events += [
            interval("wait_batch", at, at + 1),
            interval("train", at + 1, at + 2),
            a_step(step, at + 2, **values),
        ]
    write_log(directory / f"events-learner-{lineage}.jsonl", "learner", events)


def a_server(directory: Path, name: str, generation: Iterable[tuple[float, float]], tokens: Iterable[int] = ()) -> None:
    events = [interval("generate", start, end) for start, end in generation]
    events += [{"t": float(i), "kind": "heartbeat", "generated_tokens": count} for i, count in enumerate(tokens)]
    write_log(directory / name / f"events-{name}.jsonl", "rollout_server", events)


def row(text: str, name: str) -> str:
    """What the summary says under this name."""
    [found] = re.findall(rf"^  {re.escape(name)}  +(.*)$", text, re.MULTILINE)
    return str(found)


def test_a_whole_run_in_words(tmp_path: Path):
    a_learner(tmp_path, steps=range(1, 21))
    log = tmp_path / "events-learner-1.jsonl"
    more = [
        {"t": 0.0, "role": "learner", "kind": "checkpoint", "path": "run/checkpoints/step-000010", "version": 10},
        {"t": 40.0, "role": "learner", "kind": "checkpoint", "path": "run/checkpoints/step-000020", "version": 20},
        {"t": 41.0, "role": "learner", "kind": "export", "path": "run/huggingface/step-000020"},
    ]
    log.write_text(log.read_text() + "".join(json.dumps(event) + "\n" for event in more))
    a_server(tmp_path, "server-0", [(0.5, 10.5)], tokens=[0, 900, 2100])
    updates = [
        interval("weight_update", i, i + 0.2, num_bytes=num_bytes, form=form, pause_s=0.004 * (i + 1))
        for i, (num_bytes, form) in enumerate([(3_000_000, "full, no base"), (300_000, "delta"), (600_000, "delta")])
    ]
    write_log(tmp_path / "events-updates.jsonl", "rollout_server", updates)
    evaluations = [
        {"t": 50.0, "kind": "eval", "version": v, "accuracy": a, "prompts": 64} for v, a in [(0, 0.25), (20, 1)]
    ]
    write_log(tmp_path / "events-evaluation.jsonl", "evaluation", evaluations)
    assert (
        describe(summarize(tmp_path))
        == """\
  steps                 20 in 40 s
  reward in training    0.500 -> 0.500
  held-out, version 0   25.0% of 64 prompts right, greedy
  held-out, version 20  100.0% of 64 prompts right, greedy
  staleness of tokens   0.50 mean, 1 max (0: 50%, 1: 50%)
  learner idle          49%
  generation idle       75%
  both busy at once     13% of the time
  tokens                2,100 sampled, 2,000 trained
  weight updates        3, 2 as deltas, 1.3 MB pulled on average, median pause 8 ms
  policy                run/huggingface/step-000020
  checkpoint            run/checkpoints/step-000020"""
    )


def test_the_first_and_last_reward_are_means_over_a_tenth_of_the_steps(tmp_path: Path):
    write_log(
        tmp_path / "events-learner-1.jsonl", "learner",
        [interval("train", 0, 30), *(a_step(n, n, reward=float(n)) for n in range(1, 31))],
    )  # fmt: skip
    assert summarize(tmp_path).edge_rewards() == (2.0, 29.0)


def test_a_run_of_one_step_has_a_first_and_a_last_reward(tmp_path: Path):
    a_learner(tmp_path, steps=[1], reward=0.25)
    assert summarize(tmp_path).edge_rewards() == (0.25, 0.25)


def test_the_run_begins_when_something_is_sampled_for_it_and_not_while_servers_start(tmp_path: Path):
    write_log(
        tmp_path / "events-learner-1.jsonl", "learner",
        [interval("wait_batch", 0, 100), interval("train", 100, 110), a_step(1, 110)],
    )  # fmt: skip
    assert summarize(tmp_path).wall_s == 10
    a_server(tmp_path, "server-0", [(90, 95)])
    assert summarize(tmp_path).wall_s == 20
    assert summarize(tmp_path).share(summarize(tmp_path).generation) == 0.25


def test_the_pause_between_two_starts_of_the_learner_is_not_part_of_the_run(tmp_path: Path):
    a_learner(tmp_path, steps=[1, 2])
    a_learner(tmp_path, lineage=2, start=10_000.0, steps=[3, 4])
    a_server(tmp_path, "server-0", [(3.0, 4.0), (5000.0, 6000.0), (10_000.5, 10_001.0)])
    run = summarize(tmp_path)
    assert row(describe(run), "steps") == "4 in 6.5 s of training, in 2 starts"
    assert run.spans == [(1.0, 4.0), (10_000.5, 10_004.0)]
    assert run.wall_s == 6.5
    assert run.share(run.generation) == pytest.approx(1.5 / 6.5)
    assert run.on_clock(run.generation) == [(2.0, 3.0), (3.0, 3.5)]
    assert run.on_clock(run.training) == [(0.0, 1.0), (2.0, 3.0), (3.5, 4.5), (5.5, 6.5)]


def test_a_step_that_was_taken_again_after_a_crash_counts_once_as_it_was_taken_last(tmp_path: Path):
    a_learner(tmp_path, steps=[1, 2, 3], reward=0.1)
    a_learner(tmp_path, lineage=2, start=100.0, steps=[2, 3, 4], reward=0.9)
    assert [(step["step"], step["reward"]) for step in summarize(tmp_path).steps] == [
        (1, 0.1), (2, 0.9), (3, 0.9), (4, 0.9),
    ]  # fmt: skip


def test_tokens_of_all_servers_and_of_all_their_starts_are_summed_up(tmp_path: Path):
    a_learner(tmp_path)
    a_server(tmp_path, "first", [(0, 1)], tokens=[10, 500, 40, 90])  # started again after 500
    a_server(tmp_path, "second", [(0, 1)], tokens=[7])
    assert summarize(tmp_path).generated_tokens == 500 + 90 + 7


def test_two_servers_that_sample_at_once_are_busy_once(tmp_path: Path):
    a_learner(tmp_path, steps=[1, 2])
    a_server(tmp_path, "first", [(1.0, 2.0)])
    a_server(tmp_path, "second", [(1.5, 3.0)])
    run = summarize(tmp_path)
    assert run.share(run.generation) == pytest.approx(2 / 3)
    assert run.overlap == pytest.approx(1 / 3)


def test_without_the_servers_logs_nothing_is_said_about_generation(tmp_path: Path):
    a_learner(tmp_path)
    text = describe(summarize(tmp_path))
    assert row(text, "generation idle").startswith("unknown: copy the rollout servers' events-*.jsonl")
    assert "both busy" not in text
    assert row(text, "policy") == "not exported yet: the run has not finished"
    assert row(text, "weight updates") == "none"


def test_a_run_that_trained_no_token_has_no_staleness(tmp_path: Path):
    a_learner(tmp_path, staleness_histogram={})
    assert row(describe(summarize(tmp_path)), "staleness of tokens") == "unknown: no tokens were trained"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "holds no events of a run; give the learner's --run-dir"),
        ("", "has not completed a step yet"),
        ('{"t":1,"t_end":2,"role":"learner","kind":"train"}\n', "has not completed a step yet"),
        ("garbage\n\n{}\n", "events-learner-1.jsonl:3 is not an event"),
    ],
)
@pytest.mark.parametrize("command", [lambda run: main([run]), lambda run: countercurrent(["report", run])])
def test_what_is_no_run_is_told_in_one_sentence(
    command: Any, content: str | None, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    if content is not None:
        (tmp_path / "events-learner-1.jsonl").write_text(content)
    with pytest.raises(UserError, match=re.escape(sentence)):
        summarize(tmp_path)
    assert command(str(tmp_path)) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert sentence in line


def test_the_report_is_printed_and_written_beside_the_run_with_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    a_learner(tmp_path)
    a_server(tmp_path, "server-0", [(0, 5), (6, 20)])
    assert main([str(tmp_path)]) == 0
    text = (tmp_path / "summary.txt").read_text()
    assert text in capsys.readouterr().out
    height, width, _ = matplotlib.image.imread(tmp_path / "summary.png").shape
    assert (width, height) == (1560, 1152)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"steps": [1]},
        {"staleness_histogram": {}},
        {"staleness_histogram": {str(age): 1 for age in range(17)}},
        {"reward": -3.5},
    ],
    ids=["ordinary", "one step", "no tokens", "many ages", "negative reward"],
)
def test_every_run_can_be_drawn(tmp_path: Path, values: Event):
    """Without a warning: those are errors here."""
    a_learner(tmp_path, **values)
    draw(summarize(tmp_path), tmp_path / "summary.png")
    a_server(tmp_path, "server-0", [(0, 1)])
    draw(summarize(tmp_path), tmp_path / "summary.png")


@pytest.mark.parametrize(("rewards", "inside"), [([-2.0, 4.0], (-2.0, 4.0)), ([0.4, 0.6], (0.0, 1.0))])
def test_the_reward_axis_shows_all_rewards_and_the_whole_scale_of_shares(
    tmp_path: Path, rewards: list[float], inside: tuple[float, float]
):
    write_log(
        tmp_path / "events-learner-1.jsonl", "learner",
        [interval("train", 0, 30), *(a_step(n, n, reward=reward) for n, reward in enumerate(rewards))],
    )  # fmt: skip
    figure, axis = plt.subplots()
    draw_reward(axis, summarize(tmp_path))
    bottom, top = axis.get_ylim()
    plt.close(figure)
    assert bottom <= inside[0]
    assert inside[1] <= top


def test_busy_shares_are_those_of_the_moments_counted_one_by_one():
    rng = np.random.default_rng(0)
    for _ in range(50):
        points = sorted(rng.choice(200, size=2 * int(rng.integers(0, 12)), replace=False).tolist())
        intervals = list(zip(points[::2], points[1::2], strict=True))
        edges = np.linspace(0, 200, 21)
        busy = np.zeros(200)
        for start, end in intervals:
            busy[start:end] = 1.0
        np.testing.assert_allclose(busy_shares(intervals, edges), busy.reshape(20, 10).mean(axis=1), atol=1e-12)


def test_smoothing_keeps_a_constant_and_the_length_and_leaves_short_runs_alone():
    np.testing.assert_allclose(smooth(np.full(200, 0.7)), 0.7)
    short = np.array([0.0, 1.0, 0.0, 1.0])
    np.testing.assert_array_equal(smooth(short), short)
    step = smooth(np.repeat([0.0, 1.0], 100))
    assert len(step) == 200
    assert step[99] + step[100] == pytest.approx(1.0)  # centred: the edge stays where it is


def test_the_lower_timeline_is_a_dozen_steps_from_the_middle_or_all_of_a_short_run(tmp_path: Path):
    a_learner(tmp_path, steps=range(1, 121))  # the run begins with the first training, a second after the wait
    start, end = zoom_window(summarize(tmp_path))
    assert start + end == pytest.approx(239)
    assert end - start == pytest.approx(23.9)
    a_learner(tmp_path, steps=range(1, 4))
    assert zoom_window(summarize(tmp_path)) == (0, 5)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.42, "0.4 s"), (9.96, "10.0 s"), (137.4, "137 s"), (600, "10 min"), (3599, "1 h 0 min"), (9000, "2 h 30 min")],
)
def test_durations_are_read_at_a_glance(seconds: float, text: str):
    assert duration(seconds) == text


def an_evaluation(version: int, **values: Any) -> Event:
    defaults = {
        "asked_version": version, "complete": True, "samples": 4, "temperature": 1.0, "reward": 0.5,
        "reward_error": 0.05, "pass_at_4": 0.75, "tasks": 64.0, "failed_tasks": 0.0,
    }  # fmt: skip
    return {"t": float(version), "kind": "evaluation", "version": version, **defaults, **values}


def test_of_what_was_evaluated_beside_training_the_first_the_best_and_the_last_are_told(tmp_path: Path):
    a_learner(tmp_path, steps=range(1, 41))
    given_up = {"t": 31.0, "kind": "evaluation", "version": -1, "asked_version": 30, "complete": False}
    events = [
        an_evaluation(0, reward=0.1, pass_at_1=0.0, samples=1, temperature=0.0),
        an_evaluation(10, reward=0.4),
        an_evaluation(20, reward=0.3),
        an_evaluation(20, reward=0.9, failed_tasks=2.0, t=25.0),  # by a resumed learner: this one counts
        given_up,
        an_evaluation(40, reward=0.8),
        interval("evaluating", 5.0, 7.0, version=0),
        interval("evaluating", 25.0, 29.0, version=20),
        interval("evaluating", 78.0, 90.0, version=40),  # when the last step, at 80, was taken
    ]
    a_server(tmp_path, "server-0", [(0.0, 6.0), (26.0, 29.0), (79.0, 80.0)])
    write_log(tmp_path / "events-learner-2.jsonl", "learner", events)
    run = summarize(tmp_path)
    text = describe(run)
    assert row(text, "evaluations") == "4 versions, 1 given up, median 2.0 s, generation busy 62% of that time"
    assert row(text, "evaluated, version 0") == "mean reward 0.100 +- 0.050, pass@1 0.00, 64 tasks, greedy"
    assert row(text, "evaluated, version 20") == (
        "mean reward 0.900 +- 0.050, pass@4 0.75, 64 tasks, 2 failed, 4 samples at temperature 1"
    )
    assert "evaluated, version 10" not in text
    assert row(text, "evaluated, version 40").startswith("mean reward 0.800")
    figure, axis = plt.subplots()
    draw_reward(axis, run)
    [held_out] = [line for line in axis.get_lines() if line.get_label() == "held-out tasks"]
    plt.close(figure)
    assert held_out.get_xydata().tolist() == [[0, 0.1], [10, 0.4], [20, 0.9], [40, 0.8]]


def test_a_run_whose_evaluations_were_all_given_up_says_so(tmp_path: Path):
    a_learner(tmp_path)
    write_log(tmp_path / "events-learner-2.jsonl", "learner", [an_evaluation(0, complete=False)])
    assert row(describe(summarize(tmp_path)), "evaluations given up") == "1"
