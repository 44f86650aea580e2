"""Summary of a run, from its event logs: text for the terminal, and what the picture is made of.

`python -m deploy.report RUN_DIR` prints the summary and writes summary.txt and summary.png beside the run.
"""

import argparse
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from common.events import Event, Intervals, intersect, intervals_of, length_s, merge, read_events
from common.lifecycle import EXIT_USER_ERROR, UserError
from learner.rates import describe_bytes

WAYS = {"delta": "as deltas", "shared memory": "through shared memory"}  # the others were pulled whole
EDGE_SHARE = 0.1  # first and last reward: means over so much of the steps


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What a run did while it was training: from its first to its last step, without the pauses between its starts."""

    directory: Path
    spans: Intervals  # one for each start of the learner
    steps: Sequence[Event]
    evaluations: Sequence[Event]  # of checkpoints, before and after the run
    evaluated: Sequence[Event]  # versions evaluated while it trained, ascending; complete ones
    evaluating: Intervals  # while it trained
    num_given_up: int  # evaluations that were not completed
    updates: Sequence[Event]
    training: Intervals
    waiting: Intervals
    generation: Intervals  # empty when the rollout servers' logs are not here
    generated_tokens: int
    policy: str
    checkpoint: str

    @property
    def wall_s(self) -> float:
        return length_s(self.spans)

    def share(self, intervals: Intervals) -> float:
        """Of the wall time."""
        return length_s(intersect(intervals, self.spans)) / self.wall_s

    def on_clock(self, intervals: Intervals) -> Intervals:
        """The intervals in seconds since the run began, on a clock that stands still between its starts."""
        moved, before_s = [], 0.0
        for start, end in self.spans:
            within = intersect(intervals, [(start, end)])
            moved += [(left - start + before_s, right - start + before_s) for left, right in within]
            before_s += end - start
        return moved

    @property
    def overlap(self) -> float:
        """Share of the wall time in which both were busy."""
        return self.share(intersect(self.training, self.generation))

    def staleness_shares(self) -> dict[int, float]:
        """Share of the trained tokens by age, in optimizer steps."""
        counts: Counter[int] = Counter()
        for step in self.steps:
            counts.update({int(age): count for age, count in step["staleness_histogram"].items()})
        return {age: counts[age] / counts.total() for age in sorted(counts)}

    def edge_rewards(self) -> tuple[float, float]:
        """Mean reward of the first and of the last steps."""
        rewards = [step["reward"] for step in self.steps]
        count = max(1, int(len(rewards) * EDGE_SHARE))
        return statistics.fmean(rewards[:count]), statistics.fmean(rewards[-count:])


def summarize(directory: Path) -> RunSummary:
    """Raises UserError when there is no run, or none that has trained yet, or a log of it is damaged."""
    paths = sorted(directory.rglob("events-*.jsonl"))
    if not paths:
        raise UserError(f"{directory} holds no events of a run; give the learner's --run-dir")
    try:
        logs = [read_events([path]) for path in paths]
    except ValueError as error:
        raise UserError(str(error)) from error
    events = sorted((event for log in logs for event in log), key=lambda event: event["t"])
    # A step that a resumed learner took again counts as it was taken last: that one is in the policy.
    steps = {event["step"]: event for event in events if event["kind"] == "step"}
    if not steps:
        raise UserError(f"the run in {directory} has not completed a step yet")
    generation = intervals_of(events, "generate")
    in_run = [event for event in events if event["kind"] == "evaluation"]
    evaluated = {event["version"]: event for event in in_run if event["complete"]}
    exports = [event["path"] for event in events if event["kind"] == "export"]
    checkpoints = [event["path"] for event in events if event["kind"] == "checkpoint"]
    spans = merge([_span(log, generation) for log in logs if intervals_of(log, "train")])
    return RunSummary(
        directory=directory,
        spans=spans,
        steps=[steps[number] for number in sorted(steps)],
        evaluations=[event for event in events if event["kind"] == "eval"],
        evaluated=[evaluated[version] for version in sorted(evaluated)],
        evaluating=intersect(intervals_of(events, "evaluating"), spans),
        num_given_up=sum(not event["complete"] for event in in_run),
        updates=[event for event in events if event["kind"] == "weight_update"],
        training=intervals_of(events, "train"),
        waiting=intervals_of(events, "wait_batch"),
        generation=generation,
        generated_tokens=sum(_total([e["generated_tokens"] for e in log if e["kind"] == "heartbeat"]) for log in logs),
        policy=exports[-1] if exports else "not exported yet: the run has not finished",
        checkpoint=checkpoints[-1] if checkpoints else "none yet",
    )


def _span(log: Sequence[Event], generation: Intervals) -> tuple[float, float]:
    """From what was sampled for this learner's first step to the end of its last one; waiting for servers is before."""
    training = intervals_of(log, "train")
    sampled = [start for start, _ in generation if log[0]["t"] <= start < training[0][0]]
    return min([training[0][0], *sampled]), training[-1][1]


def _total(counts: Sequence[int]) -> int:
    """What a counter counted, over all the starts of its process: each begins at zero."""
    return sum(later - earlier if later >= earlier else later for earlier, later in pairwise([0, *counts]))


def describe(run: RunSummary) -> str:
    """The summary as lines of text."""
    first, last = run.edge_rewards()
    trained = int(sum(step["trained_tokens"] for step in run.steps))
    rows = [
        ("steps", f"{len(run.steps)} in {duration(run.wall_s)}" + _starts(len(run.spans))),
        ("reward in training", f"{first:.3f} -> {last:.3f}"),
        *[(f"held-out, version {e['version']}", _evaluation(e)) for e in run.evaluations],
        *_evaluated(run),
        ("staleness of tokens", _staleness(run.staleness_shares())),
        ("learner idle", f"{run.share(run.waiting):.0%}"),
        *_generation(run),
        ("tokens", f"{run.generated_tokens:,} sampled, {trained:,} trained"),
        ("weight updates", _updates(run.updates)),
        ("policy", run.policy),
        ("checkpoint", run.checkpoint),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def _starts(count: int) -> str:
    return f" of training, in {count} starts" if count > 1 else ""


def duration(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _evaluation(event: Event) -> str:
    return f"{event['accuracy']:.1%} of {event['prompts']} prompts right, greedy"


def _evaluated(run: RunSummary) -> list[tuple[str, str]]:
    """Of what was evaluated while the run trained: the first, the best and the last."""
    if not run.evaluated:
        return [("evaluations given up", str(run.num_given_up))] if run.num_given_up else []
    first, last = run.evaluated[0], run.evaluated[-1]
    best = max(run.evaluated, key=lambda event: event["reward"])
    shown = {event["version"]: event for event in (first, best, last)}
    rows = [(f"evaluated, version {version}", _evaluated_in_words(shown[version])) for version in sorted(shown)]
    told = [f"{len(run.evaluated)} versions"]
    if run.num_given_up:
        told.append(f"{run.num_given_up} given up")
    if run.evaluating:
        told.append(f"median {duration(statistics.median(end - start for start, end in run.evaluating))}")
        if run.generation:
            share = length_s(intersect(run.evaluating, run.generation)) / length_s(run.evaluating)
            told.append(f"generation busy {share:.0%} of that time")
    return [("evaluations", ", ".join(told)), *rows]


def _evaluated_in_words(event: Event) -> str:
    samples = event["samples"]
    how = "greedy" if event["temperature"] == 0 else f"{samples} samples at temperature {event['temperature']:g}"
    failed = f", {event['failed_tasks']:.0f} failed" if event["failed_tasks"] else ""
    return (
        f"mean reward {event['reward']:.3f} +- {event['reward_error']:.3f}, pass@{samples} "
        f"{event[f'pass_at_{samples}']:.2f}, {event['tasks']:.0f} tasks{failed}, {how}"
    )


def _staleness(shares: dict[int, float]) -> str:
    if not shares:
        return "unknown: no tokens were trained"
    mean = sum(age * share for age, share in shares.items())
    listed = ", ".join(f"{age}: {share:.0%}" for age, share in shares.items())
    return f"{mean:.2f} mean, {max(shares)} max ({listed})"


def _generation(run: RunSummary) -> list[tuple[str, str]]:
    if not run.generation:
        return [("generation idle", "unknown: copy the rollout servers' events-*.jsonl into the run directory")]
    return [
        ("generation idle", f"{1 - run.share(run.generation):.0%}"),
        ("both busy at once", f"{run.overlap:.0%} of the time"),
    ]


def _updates(updates: Sequence[Event]) -> str:
    if not updates:
        return "none"
    pauses_s = [event["pause_s"] for event in updates if "pause_s" in event]
    pause = f"{statistics.median(pauses_s) * 1e3:.0f} ms" if pauses_s else "unknown"
    forms = Counter(event.get("form") for event in updates)
    ways = [f"{forms[form]} {way}" for form, way in WAYS.items() if forms[form]]
    pulled = describe_bytes(statistics.fmean(event["num_bytes"] for event in updates))
    return ", ".join([str(len(updates)), *ways, f"{pulled} pulled on average", f"median pause {pause}"])


def write_report(directory: Path) -> int:
    """Print the summary, and write summary.txt and summary.png beside the run; raises UserError as summarize does."""
    from deploy.picture import draw  # takes a second to import

    run = summarize(directory)
    text = describe(run)
    picture = directory / "summary.png"
    draw(run, picture)
    (directory / "summary.txt").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n  picture: {picture}\n")
    return 0


def show_report(directory: Path) -> int:
    """write_report for people: returns the exit code."""
    try:
        return write_report(directory)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.report", description="Summarise a run: text and picture.")
    parser.add_argument("run_dir", type=Path, help="the learner's --run-dir")
    return show_report(parser.parse_args(argv).run_dir)


if __name__ == "__main__":
    sys.exit(main())
