"""Live progress of a run: a panel in a terminal, a plain line now and then elsewhere."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.table import Table

from common.messages import CoordinatorStatus
from common.trajectory import Group
from learner.training import StepResult

WINDOW_S = 20.0
LINE_EVERY_S = 5.0
REWARD_STEPS = 20  # the reward shown is the mean over so many steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Totals at one moment; differences over the window are rates and shares."""

    at_s: float
    waited_s: float  # by the learner, for batches
    busy_s: float  # of all engines together
    generated_tokens: int
    num_servers: int


def idle_shares(first: Sample, last: Sample) -> tuple[float, float, float]:
    """(learner idle share, generation idle share, generated tokens per second) between two samples."""
    elapsed_s = max(last.at_s - first.at_s, 1e-9)
    generation_busy = (last.busy_s - first.busy_s) / (elapsed_s * max(last.num_servers, 1))
    tokens_per_s = (last.generated_tokens - first.generated_tokens) / elapsed_s
    return _share((last.waited_s - first.waited_s) / elapsed_s), _share(1.0 - generation_busy), max(tokens_per_s, 0.0)


def _share(value: float) -> float:
    return min(max(value, 0.0), 1.0)


class Progress:
    """Follows a run; `lines()` is what there is to say of it now."""

    def __init__(
        self, *, total_steps: int, queue_groups: int, waited_s: Callable[[], float],
        status: Callable[[], CoordinatorStatus | None], version: int,
    ) -> None:  # fmt: skip
        self._total_steps = total_steps
        self._queue_groups = queue_groups
        self._waited_s = waited_s
        self._status = status
        self._samples: deque[Sample] = deque()
        self._rewards: deque[float] = deque(maxlen=REWARD_STEPS)
        self._version = version
        self._metrics: dict[str, float] = {}

    def step_completed(self, version: int, groups: tuple[Group, ...], result: StepResult) -> None:
        del groups
        self._version = version
        self._metrics = dict(result.metrics)
        self._rewards.append(result.metrics["reward"])

    def observe(self, now_s: float) -> None:
        """Take a sample for the rates; to be called about once a second."""
        status = self._status()
        servers = status.servers if status is not None else ()
        self._samples.append(
            Sample(
                at_s=now_s,
                waited_s=self._waited_s(),
                busy_s=sum(server.busy_s for server in servers),
                generated_tokens=sum(server.generated_tokens for server in servers),
                num_servers=len(servers),
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
            learner_idle, generation_idle, tokens_per_s = idle_shares(self._samples[0], self._samples[-1])
            fields["tokens/s"] = f"{tokens_per_s:,.0f}"
            fields["idle"] = f"learner {learner_idle:.0%}, generation {generation_idle:.0%}"
        if (status := self._status()) is not None:
            fields |= self._status_fields(status)
        return fields

    def _status_fields(self, status: CoordinatorStatus) -> dict[str, str]:
        fields = {
            "queue": f"{status.queued}/{self._queue_groups} groups, {status.queued_bytes / 1e6:.1f} MB, "
            f"{status.running} running"
        }
        lags = [f"{s.server} -{self._version - s.loaded_version}" for s in status.servers if s.loaded_version >= 0]
        if lags:
            fields["version lag"] = ", ".join(lags[:4]) + (f" and {len(lags) - 4} more" if len(lags) > 4 else "")
        failed = sum(status.failed.values())
        if failed:
            fields["failed"] = ", ".join(f"{count} {kind}" for kind, count in status.failed.items())
        if status.waiting_for:
            fields["waiting for"] = status.waiting_for
        return fields

    def line(self) -> str:
        return "  ".join(f"{name} {value}" for name, value in self.fields().items() if name != "waiting for")

    def __rich__(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for name, value in self.fields().items():
            table.add_row(f"[dim]{name}[/dim]", value)
        return table


class ProgressDisplay:
    """Shows a Progress: live in a terminal, else a line every few seconds. A context manager."""

    def __init__(self, progress: Progress, console: Console) -> None:
        self._progress = progress
        self._console = console
        self._live = Live(progress, console=console, auto_refresh=False) if console.is_terminal else None
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
