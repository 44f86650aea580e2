"""VitalSigns: what a rollout server tells of itself, to the learner and to Prometheus."""

from collections.abc import Iterator

from common.events import EventLog
from common.messages import Heartbeat
from common.metrics import Measurement
from rollout_server.busy import MeteredEngine
from rollout_server.evaluations import Evaluations
from rollout_server.held_leases import HeldLeases
from rollout_server.weight_receiver import WeightReceiver

MAX_TEXT = 4096  # characters, in a message


class VitalSigns:
    """Of one server: counters since the process started, and what it is at."""

    def __init__(
        self,
        engine: MeteredEngine,
        receiver: WeightReceiver,
        leases: HeldLeases,
        evaluations: Evaluations,
        events: EventLog,
    ) -> None:
        self._engine = engine
        self._receiver = receiver
        self._leases = leases
        self._evaluations = evaluations
        self._events = events
        self.progress = 0  # grows whenever the work loop got something done
        self.waiting_for = ""  # what the learner says that keeps leases away

    def heartbeat(self) -> Heartbeat:
        """As things are now; also an event."""
        heartbeat = Heartbeat(
            progress=self.progress,
            loaded_version=self._receiver.loaded_version,
            running_groups=self._leases.num_working,
            generated_tokens=self._engine.generated_tokens,
            busy_s=self._engine.busy_s,
            paused_s=self._receiver.paused_s,
            doing=self._doing()[:MAX_TEXT],
            out_of_service=self._receiver.doubt[:MAX_TEXT],
            updates=self._receiver.deltas_loaded + self._receiver.full_loaded,
            pulled_bytes=self._receiver.received_bytes,
            holding=self._receiver.holding,
            relay_address=self._receiver.relaying.offered_at,
            relay_key=self._receiver.relaying.public_key,
            lying_relay=self._receiver.relaying.upstream.last_liar,
        )
        self._events.emit("heartbeat", generated_tokens=heartbeat.generated_tokens, running=heartbeat.running_groups)
        return heartbeat

    def _doing(self) -> str:
        if self._receiver.doubt:
            return "repairing the weights"
        if self._leases.num_working:
            return "generating"
        return self.waiting_for or f"waiting for leases at version {self._receiver.loaded_version}"

    def metrics(self) -> Iterator[Measurement]:
        yield Measurement(name="running_groups", value=self._leases.num_working, help="leases being worked on")
        yield Measurement(name="running_evaluations", value=len(self._evaluations), help="evaluation tasks")
        yield Measurement(
            name="unacknowledged_groups", value=self._leases.num_unacknowledged, help="sent, not yet accepted"
        )
        yield Measurement(name="loaded_version", value=self._receiver.loaded_version, help="policy version sampling")
        yield Measurement(name="published_version", value=self._receiver.published_version, help="newest known")
        yield Measurement(name="generated_tokens_total", value=self._engine.generated_tokens, help="tokens sampled")
        yield Measurement(name="generating_seconds_total", value=self._engine.busy_s, help="requests were running")
        yield Measurement(name="update_pause_seconds_total", value=self._receiver.paused_s, help="paused for weights")
        yield Measurement(name="weight_bytes_total", value=self._receiver.received_bytes, help="of snapshots pulled")
        yield Measurement(name="deltas_loaded_total", value=self._receiver.deltas_loaded, help="versions, as deltas")
        yield Measurement(name="out_of_service", value=bool(self._receiver.doubt), help="1: its weights are wrong")
        yield Measurement(name="failed_canaries_total", value=self._receiver.canaries_failed, help="wrong weights")
        yield Measurement(name="full_snapshots_loaded_total", value=self._receiver.full_loaded, help="versions, whole")
        yield from self._receiver.relaying.metrics()
