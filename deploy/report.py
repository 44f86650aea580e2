"""Summary of a run, from its event logs: text for the terminal, and what the picture is made of."""

import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.events import Event, Intervals, intersect, intervals_of, length_s, read_events
from common.lifecycle import UserError

EDGE_SHARE = 0.1  # first and last reward: means over so much of the steps


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What a run did, between its first and its last training step."""

    directory: Path
    steps: Sequence[Event]
    evaluations: Sequence[Event]
    updates: Sequence[Event]
    training: Intervals
    waiting: Intervals
    generation: Intervals
    generated_tokens: int
    checkpoint: str

    @property
    def start(self) -> float:
        return min(self.training[0][0], self.generation[0][0] if self.generation else self.training[0][0])

    @property
    def end(self) -> float:
        return self.training[-1][1]

    @property
    def wall_s(self) -> float:
        return self.end - self.start

    def share(self, intervals: Intervals) -> float:
        return length_s(intersect(intervals, [(self.start, self.end)])) / self.wall_s

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
    """Raises UserError when there is no run, or none that has trained yet."""
    paths = sorted(directory.rglob("events-*.jsonl"))
    if not paths:
        raise UserError(f"{directory} holds no events of a run; give the learner's --run-dir")
    events = read_events(paths)
    training = intervals_of(events, "train")
    if not training:
        raise UserError(f"the run in {directory} has not taken a step yet")
    exports = [event["path"] for event in events if event["kind"] == "export"]
    return RunSummary(
        directory=directory,
        steps=[event for event in events if event["kind"] == "step"],
        evaluations=[event for event in events if event["kind"] == "eval"],
        updates=[event for event in events if event["kind"] == "weight_update"],
        training=training,
        waiting=intervals_of(events, "wait_batch"),
        generation=intervals_of(events, "generate"),
        generated_tokens=_generated_tokens(paths),
        checkpoint=exports[-1] if exports else "none yet: the run has not finished",
    )


def _generated_tokens(paths: Sequence[Path]) -> int:
    """Of all rollout servers; each counts from its own start."""
    total = 0
    for path in paths:
        counts = [event["generated_tokens"] for event in read_events([path]) if event["kind"] == "heartbeat"]
        total += max(counts, default=0)
    return total


def describe(run: RunSummary) -> str:
    """The summary as lines of text."""
    first, last = run.edge_rewards()
    shares = run.staleness_shares()
    mean_age = sum(age * share for age, share in shares.items())
    trained = int(sum(step["trained_tokens"] for step in run.steps))
    rows = [
        ("steps", f"{len(run.steps)} in {run.wall_s:.0f} s"),
        ("reward in training", f"{first:.3f} -> {last:.3f}"),
        *[(f"held-out, version {e['version']}", _evaluation(e)) for e in run.evaluations],
        ("staleness of tokens", f"{mean_age:.2f} mean, {max(shares)} max ({_percentages(shares)})"),
        ("learner idle", f"{1 - run.share(run.training):.0%}"),
        ("generation idle", f"{1 - run.share(run.generation):.0%}"),
        ("both busy at once", f"{run.overlap:.0%} of the time"),
        ("tokens", f"{run.generated_tokens:,} sampled, {trained:,} trained"),
        ("weight updates", _updates(run.updates)),
        ("policy", run.checkpoint),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def _evaluation(event: Event) -> str:
    return f"{event['accuracy']:.1%} of {event['prompts']} prompts right, greedy"


def _percentages(shares: dict[int, float]) -> str:
    return ", ".join(f"{age}: {share:.0%}" for age, share in shares.items())


def _updates(updates: Sequence[Event]) -> str:
    if not updates:
        return "none"
    pauses_s = [event["pause_s"] for event in updates if "pause_s" in event]
    return f"{len(updates)}, {updates[-1]['num_bytes'] / 1e6:.1f} MB each, median pause {_milliseconds(pauses_s)}"


def _milliseconds(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds) * 1e3:.0f} ms" if seconds else "unknown"


def write_report(directory: Path) -> int:
    """Print the summary, and write summary.txt and summary.png beside the run."""
    from deploy.picture import draw  # takes a second to import

    run = summarize(directory)
    text = describe(run)
    picture = directory / "summary.png"
    draw(run, picture)
    (directory / "summary.txt").write_text(text + "\n")
    print(f"\n{text}\n  picture: {picture}\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(write_report(Path(sys.argv[1])))
    except UserError as error:
        sys.exit(f"{error}")
