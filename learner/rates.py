"""Rates: what happened in a run between two moments, from totals of the learner and of all its rollout servers."""

from collections.abc import Sequence
from dataclasses import dataclass

from learner.coordinator.messages import ServerStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Totals at one moment; differences over the window are rates and shares."""

    at_s: float
    waited_s: float = 0.0  # by the learner, for batches
    trained_tokens: float = 0.0
    server_s: float = 0.0  # time that servers were there, of all together, as the three below
    busy_s: float = 0.0
    paused_s: float = 0.0
    generated_tokens: int = 0
    updates: int = 0  # of weights, likewise of all servers together
    pulled_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Rates:
    """What happened between two samples."""

    first: Sample
    last: Sample

    @property
    def elapsed_s(self) -> float:
        return max(self.last.at_s - self.first.at_s, 1e-9)

    @property
    def server_s(self) -> float:
        return max(self.last.server_s - self.first.server_s, 1e-9)

    @property
    def learner_idle(self) -> float:
        return _share((self.last.waited_s - self.first.waited_s) / self.elapsed_s)

    @property
    def generation_idle(self) -> float:
        """Mean over the servers; 1 when there was none."""
        return _share(1.0 - (self.last.busy_s - self.first.busy_s) / self.server_s)

    @property
    def paused(self) -> float:
        """Share of the servers' time that weight updates took."""
        return _share((self.last.paused_s - self.first.paused_s) / self.server_s)

    @property
    def updates(self) -> int:
        """Versions that servers loaded, each server's counted."""
        return self.last.updates - self.first.updates

    @property
    def pause_of_update_s(self) -> float:
        return max(self.last.paused_s - self.first.paused_s, 0.0) / max(self.updates, 1)

    @property
    def bytes_of_update(self) -> float:
        """What a server pulled for a version; nothing where it shares the learner's memory."""
        return max(self.last.pulled_bytes - self.first.pulled_bytes, 0) / max(self.updates, 1)

    @property
    def generated_tokens_per_s(self) -> float:
        return (self.last.generated_tokens - self.first.generated_tokens) / self.elapsed_s

    @property
    def trained_tokens_per_s(self) -> float:
        return (self.last.trained_tokens - self.first.trained_tokens) / self.elapsed_s


def _share(value: float) -> float:
    return min(max(value, 0.0), 1.0)


class FleetTotals:
    """What the rollout servers did together, although each counts from its own start and they come and go."""

    def __init__(self) -> None:
        self.server_s = self.busy_s = self.paused_s = 0.0
        self.generated_tokens = self.updates = self.pulled_bytes = 0
        self._last: dict[str, ServerStatus] = {}

    def observe(self, servers: Sequence[ServerStatus], elapsed_s: float) -> None:
        """Add what each did since it was last seen; a server seen first, or started again, only begins to count."""
        for server in servers:
            before = self._last.get(server.server)
            if before is None or _began_again(server, before):
                continue
            self.server_s += elapsed_s
            self.busy_s += server.busy_s - before.busy_s
            self.paused_s += server.paused_s - before.paused_s
            self.generated_tokens += server.generated_tokens - before.generated_tokens
            self.updates += server.updates - before.updates
            self.pulled_bytes += server.pulled_bytes - before.pulled_bytes
        self._last = {server.server: server for server in servers if server.loaded_version >= 0}


def _began_again(server: ServerStatus, before: ServerStatus) -> bool:
    return (
        server.busy_s < before.busy_s
        or server.paused_s < before.paused_s
        or server.generated_tokens < before.generated_tokens
    )


def describe_bytes(num_bytes: float) -> str:
    """For people: 0 B, 1.3 kB, 140.2 GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:,.1f} {unit}"
    return f"{num_bytes:.0f} B"
