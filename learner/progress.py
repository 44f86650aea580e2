"""Live progress of a run: a panel in a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections import deque
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from common.trajectory import Group
from learner.coordinator.dynamic_sampling import EQUAL_REWARDS
from learner.coordinator.messages import CoordinatorStatus
from learner.evaluation import Evaluation
from learner.rates import FleetTotals, Rates, Sample, describe_bytes
from learner.snapshot_messages import SnapshotReady
from learner.training import StepResult

WINDOW_S = 20.0
LINE_EVERY_S = 5.0
REWARD_STEPS = 20  # the reward shown is the mean over so many steps
MAX_NAMED = 4


class Progress:
    """Follows a run; `fields()` is what there is to say of it now."""

    def __init__(
        self, *, total_steps: int, queue_groups: int, waited_s: Callable[[], float],
        status: Callable[[], CoordinatorStatus | None], version: int,
        published: Callable[[], SnapshotReady | None] = lambda: None,
        evaluated: Callable[[], Evaluation | None] = lambda: None,
    ) -> None:  # fmt: skip
        self._total_steps = total_steps
        self._queue_groups = queue_groups
        self._waited_s = waited_s
        self._status = status
        self._published = published
        self._evaluated = evaluated
        self._fleet = FleetTotals()
        self._samples: deque[Sample] = deque()
        self._rewards: deque[float] = deque(maxlen=REWARD_STEPS)
        self._version = version
        self._metrics: dict[str, float] = {}
        self._trained_tokens = 0.0

    def step_completed(self, version: int, groups: tuple[Group, ...], result: StepResult) -> None:
        del groups
        self._version = version
        self._metrics = dict(result.metrics)
        self._rewards.append(result.metrics["reward"])
        self._trained_tokens += result.metrics["trained_tokens"]

    def observe(self, now_s: float) -> None:
        """Take a sample for the rates; to be called about once a second."""
        status = self._status()
        elapsed_s = now_s - self._samples[-1].at_s if self._samples else 0.0
        self._fleet.observe(status.servers if status is not None else (), elapsed_s)
        self._samples.append(
            Sample(
                at_s=now_s,
                waited_s=self._waited_s(),
                trained_tokens=self._trained_tokens,
                server_s=self._fleet.server_s,
                busy_s=self._fleet.busy_s,
                paused_s=self._fleet.paused_s,
                generated_tokens=self._fleet.generated_tokens,
                updates=self._fleet.updates,
                pulled_bytes=self._fleet.pulled_bytes,
            )
        )
        while self._samples[-1].at_s - self._samples[0].at_s > WINDOW_S:
            self._samples.popleft()

    def fields(self) -> dict[str, str]:
        """The values of the display, by their names."""
        fields = {"step": f"{self._version}/{self._total_steps}"}
        if self._rewards:
            fields["reward"] = f"{sum(self._rewards) / len(self._rewards):.3f}"
            mean, largest = self._metrics["staleness_mean"], self._metrics["staleness_max"]
            fields["staleness"] = f"{mean:.2f} mean, {largest:.0f} max"
        if len(self._samples) > 1:
            rates = Rates(self._samples[0], self._samples[-1])
            fields["tokens/s"] = (
                f"{rates.generated_tokens_per_s:,.0f} sampled, {rates.trained_tokens_per_s:,.0f} trained"
            )
            fields["idle"] = f"learner {rates.learner_idle:.0%}, generation {rates.generation_idle:.0%}"
            fields["updates"] = _describe_updates(rates)
        if (published := self._published()) is not None:
            fields["weights"] = _describe(published)
        if (evaluated := self._evaluated()) is not None:
            fields["evaluation"] = evaluated.brief
        if (status := self._status()) is not None:
            fields |= self._status_fields(status)
        return fields

    def _status_fields(self, status: CoordinatorStatus) -> dict[str, str]:
        fields = {
            "queue": f"{status.queued}/{self._queue_groups} groups, {status.queued_bytes / 1e6:.1f} MB, "
            f"{status.running} running"
        }
        servers = [f"{s.server} {self._lag(s.loaded_version)}" for s in status.servers]
        if servers:
            fields["servers"] = _first(servers)
        out = [f"{s.server}: {s.out_of_service}" for s in status.servers if s.out_of_service]
        if out:
            fields["out of service"] = _first(out)
        failed = [f"{count} {kind}" for kind, count in status.failed.items() if count]
        if failed:
            fields["failed"] = _first(failed)
        if filtered := status.cancelled.get(EQUAL_REWARDS):
            fields["filtered"] = f"{filtered} groups of equal rewards"
        if status.evaluation:
            fields["evaluating"] = status.evaluation
        if status.waiting_for:
            fields["waiting for"] = status.waiting_for
        return fields

    def _lag(self, loaded_version: int) -> str:
        if loaded_version < 0:
            return "starting"
        behind = self._version - loaded_version
        return f"{behind} behind" if behind > 0 else "current"

    def line(self) -> str:
        return "  ".join(f"{name} {value}" for name, value in self.fields().items() if name != "waiting for")

    def __rich__(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for name, value in self.fields().items():
            # Text, not markup: names of servers and reasons of failures are other people's words.
            table.add_row(Text(name, style="dim"), Text(value, overflow="fold"))
        bar = ProgressBar(
            total=self._total_steps, completed=self._version, width=40, complete_style="green", finished_style="green"
        )
        table.add_row("", bar)
        return table


def _describe(published: SnapshotReady) -> str:
    full = describe_bytes(published.full_bytes)
    if published.delta_bytes is None:
        return f"version {published.version}, {full}, no delta"
    return f"version {published.version}, delta of {describe_bytes(published.delta_bytes)}, in full {full}"


def _describe_updates(rates: Rates) -> str:
    pauses = f"pause generation {rates.paused:.1%}"
    if not rates.updates:
        return pauses
    pulled = f"{describe_bytes(rates.bytes_of_update)} pulled" if rates.bytes_of_update else "through shared memory"
    return f"{rates.pause_of_update_s * 1e3:,.0f} ms a version, {pulled}; {pauses}"


def _first(words: Sequence[str]) -> str:
    more = len(words) - MAX_NAMED
    return ", ".join(words[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


class ProgressDisplay:
    """Shows a Progress: live in a terminal, else a line every few seconds. A context manager."""

    def __init__(self, progress: Progress, console: Console) -> None:
        self._progress = progress
        self._console = console
        # Log lines go above the panel; not when standard error is a file: they belong there.
        self._live = (
            Live(progress, console=console, auto_refresh=False, redirect_stderr=sys.stderr.isatty())
            if console.is_terminal
            else None
        )
        self._said_s = -LINE_EVERY_S
        self._last_line = ""

    def __enter__(self) -> "ProgressDisplay":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.refresh()
        if self._live is not None:
            self._live.stop()
        else:
            self._say()

    def refresh(self) -> None:
        now_s = time.monotonic()
        self._progress.observe(now_s)
        if self._live is not None:
            self._live.refresh()
        elif now_s - self._said_s >= LINE_EVERY_S:
            self._said_s = now_s
            self._say()

    def _say(self) -> None:
        line = self._progress.line()
        if line != self._last_line:
            self._console.print(line, soft_wrap=True, highlight=False, markup=False)
            self._last_line = line
