"""ServerProcess: one start of a rollout server. It speaks as rollout_server/server.py does."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.messages import (
    PROTOCOL_VERSION,
    CoordinatorToServer,
    Evaluate,
    Finished,
    GroupHeader,
    GroupRefused,
    GroupsAccepted,
    GroupsFinished,
    Heartbeat,
    HeldLease,
    Hello,
    HoldVersions,
    Lease,
    LeaseCancelled,
    LeaseFailed,
    Leases,
    Leaving,
    Pulse,
    Ready,
    Refused,
    Welcome,
)
from common.together import in_messages, join_payloads
from tests.simulation import history as seen
from tests.simulation.evaluating import Evaluating
from tests.simulation.groups import Runs, header_of, payload_of, runs_of
from tests.simulation.liar import Liar
from tests.simulation.network import Line
from tests.simulation.plan import MAX_SAMPLED_TOKENS
from tests.simulation.weights import Weights

if TYPE_CHECKING:
    from tests.simulation.server import SimulatedServer

HELLO_INTERVAL_S = 1.0
CAPACITY_BYTES = 1 << 20
BUSY_S = 0.1  # at most, with something else, when a group is finished: what is finished meanwhile goes together


@dataclass(slots=True, eq=False)
class Work:
    """A lease that is being worked on."""

    lease: Lease
    started_at: float = 0.0


@dataclass(slots=True, eq=False)
class SentGroup:
    """A group that is finished, until it is acknowledged."""

    header: GroupHeader
    payload: bytes
    sent_at: float


class ServerProcess:
    """From its first Hello to its end."""

    def __init__(self, machine: "SimulatedServer", epoch: str) -> None:
        self.machine = machine
        self.world = machine.world
        self.plan = machine.plan
        self.epoch = epoch
        self.is_alive = True
        self.session = ""  # of the coordinator it joined
        self.run_id = ""
        self.held: dict[int, HeldLease] = {}  # every lease until it is accepted, refused, cancelled or failed
        self.working: dict[int, Work] = {}
        self.unacknowledged: dict[int, SentGroup] = {}
        self._unsent: list[SentGroup] = []
        self.weights = Weights(self)
        self.evaluating = Evaluating(self)
        self._stopped_until = 0.0  # SIGSTOP: nothing runs
        self._hangs_until = 0.0  # the engine does nothing, everything else goes on
        self._progress = 0
        self._confirmed_version = -1
        self._is_greeting = True
        self._is_loading = False
        self._unread: list[CoordinatorToServer] = []
        self._liar = Liar(self) if self.plan.lies else None
        self.line = Line(self.world, self.plan.key, self)
        self.line.connect()
        self._greet()

    def end(self) -> None:
        self.is_alive = False
        self.line.close()

    def stop(self, pause_s: float) -> None:
        self._stopped_until = max(self._stopped_until, self.world.clock.now + pause_s)

    def hang(self, hang_s: float) -> None:
        self._hangs_until = max(self._hangs_until, self.world.clock.now + hang_s)

    def say_goodbye(self) -> None:
        self.line.send(Leaving(reason="SIGTERM"))

    def is_running(self, action: Any, *arguments: Any, needs_engine: bool = False) -> bool:
        """False: not now; the action is called again when the process runs, if it ever does."""
        if not self.is_alive:
            return False
        until = max(self._stopped_until, self._hangs_until) if needs_engine else self._stopped_until
        if self.world.clock.now < until:
            self.world.clock.at(until, action, *arguments)
            return False
        return True

    # --- the conversation ------------------------------------------------------------------------------------------

    def hear(self, message: CoordinatorToServer) -> None:
        if not self.is_running(self.hear, message):
            return
        if self._is_loading:
            self._unread.append(message)
            return
        match message:
            case Pulse():
                self.weights.announce(message.published_version)
            case Welcome():
                self._hear_welcome(message)
            case Refused():
                self._hear_refusal(message)
            case HoldVersions():
                self.evaluating.hold(message)
            case Evaluate():
                self.evaluating.begin(message)
            case Finished():
                self.machine.stop("finished")
            case _:
                self._hear_of_lease(message)

    def _hear_welcome(self, welcome: Welcome) -> None:
        if not self.session:
            self._is_loading = True
            self.world.clock.after(self.world.rng.uniform(0.0, 0.5), self._enter_first, welcome)
        elif welcome.session != self.session:
            self._enter_again(welcome)
        elif self._is_greeting:
            self._is_greeting = False
            self._say_ready()

    def _enter_first(self, welcome: Welcome) -> None:
        """The model is loaded; what came meanwhile is read now."""
        if not self.is_running(self._enter_first, welcome):
            return
        self._is_loading = False
        self._enter(welcome)
        self._beat()
        unread, self._unread = self._unread, []
        for message in unread:
            self.hear(message)

    def _enter(self, welcome: Welcome) -> None:
        """Begin, or begin again: what was leased for a former start of the learner is void."""
        self.held.clear()
        self.working.clear()
        self.unacknowledged.clear()
        self._unsent.clear()
        self.session, self.run_id = welcome.session, welcome.run_id
        self.weights.follow(welcome.run_id)
        self.weights.announce(welcome.published_version)
        self._is_greeting = False
        self._say_ready()

    def _enter_again(self, welcome: Welcome) -> None:
        """Another coordinator; if it is of the same start of the learner, it takes what is held here."""
        if welcome.run_id != self.run_id:
            self._enter(welcome)
            return
        self.session = welcome.session
        self._is_greeting = False
        self._say_ready()
        self.say_alive()
        self._resend(after_s=0.0)

    def _say_ready(self) -> None:
        self.evaluating.drop_all()
        self._confirmed_version = -1
        fingerprints = {"model_fingerprint": "model-1", "tokenizer_fingerprint": "tokenizer-1"}
        capacity_groups = self.plan.capacity_groups
        held = tuple(self.held.values())
        if self._liar is not None:
            held = self._liar.claims(held)
        self.line.send(Ready(capacity_groups=capacity_groups, capacity_bytes=CAPACITY_BYTES, held=held, **fingerprints))

    def _hear_refusal(self, refused: Refused) -> None:
        if not refused.retry:
            self.machine.stop("refused")
        elif self.session:
            self._is_greeting = True
            self._confirmed_version = -1
            self._say_hello()

    def _hear_of_lease(self, message: Any) -> None:
        match message:
            case Leases(leases=leases):
                for lease in leases:
                    self._hear_lease(lease)
            case GroupsAccepted(lease_ids=lease_ids):
                for lease_id in lease_ids:
                    self._drop(lease_id)
            case LeaseCancelled(lease_id=lease_id) | GroupRefused(lease_id=lease_id):
                self._drop(lease_id)

    def _hear_lease(self, lease: Lease) -> None:
        if lease.lease_id in self.held:
            return
        self.held[lease.lease_id] = HeldLease(
            lease_id=lease.lease_id, task_id=lease.task_id, min_version=lease.min_version, proof=lease.proof
        )
        self.working[lease.lease_id] = work = Work(lease)
        self.weights.when_loaded(lease.min_version, self._begin, work)

    def _drop(self, lease_id: int) -> None:
        for where in (self.held, self.working):
            where.pop(lease_id, None)
        answered = self.unacknowledged.pop(lease_id, None)
        if answered in self._unsent:
            self._unsent.remove(answered)

    def _greet(self) -> None:
        """Until there is an answer."""
        if not self.session and not self._is_loading and self.is_running(self._greet):
            self._say_hello()
            self.world.clock.after(HELLO_INTERVAL_S, self._greet)

    def _say_hello(self) -> None:
        said_us = int(1e6 * self.world.clock.now)
        self.line.send(Hello(protocol=PROTOCOL_VERSION, server=self.plan.name, epoch=self.epoch, said_us=said_us))

    def _beat(self) -> None:
        if not self.is_running(self._beat):
            return
        if self.world.clock.now >= self._hangs_until:
            self._progress += 1
        self.say_alive()
        self._resend(after_s=self.world.plan.resend_s)
        self.world.clock.after(self.world.plan.heartbeat_s, self._beat)

    def _resend(self, *, after_s: float) -> None:
        for sent in self.unacknowledged.values():
            if sent not in self._unsent and self.world.clock.now - sent.sent_at >= after_s:
                self._send([sent])

    def say_alive(self) -> None:
        loaded = self.weights.loaded
        heartbeat = Heartbeat(
            progress=self._progress,
            loaded_version=self._liar.boast(loaded) if self._liar else loaded,
            running_groups=len(self.working),
            generated_tokens=0,
            busy_s=0.0,
            paused_s=0.0,
            doing="",
            holding=self.weights.holding,
        )
        self.line.send(heartbeat)
        self._confirmed_version = loaded

    # --- the work --------------------------------------------------------------------------------------------------

    def _begin(self, work: Work) -> None:
        if self.working.get(work.lease.lease_id) is work:
            work.started_at = self.world.clock.now
            jitter = 0.9 + 0.2 * self.world.rng.random()
            duration_s = self.plan.median_s * self.world.length_of(work.lease.task_id) * jitter
            self.world.clock.after(duration_s, self._finish, work)

    def _finish(self, work: Work) -> None:
        lease = work.lease
        if self.working.get(lease.lease_id) is not work:
            return
        if not self.is_running(self._finish, work, needs_engine=True):
            return
        del self.working[lease.lease_id]
        self._progress += 1
        if self.world.rng.random() < self.world.failing():
            self.line.send(LeaseFailed(lease_id=lease.lease_id, kind="environment_error", reason="boom"))
            self._drop(lease.lease_id)
            return
        runs = self._sampled_by(work)
        if self._liar is not None and self._liar.lie(lease, runs):
            return
        self.send_group(lease, runs)

    def _sampled_by(self, work: Work) -> Runs:
        duration_s = self.world.clock.now - work.started_at
        number = min(MAX_SAMPLED_TOKENS, 1 + int(4.0 * duration_s / self.plan.median_s))
        return runs_of(self.weights.versions(work.started_at, duration_s, number))

    def send_group(
        self, lease: Lease, runs: Runs, *, lie: str = "", claimed: Runs | None = None, once: bool = False, **how: Any
    ) -> None:
        """`runs` is what sampled the group, `claimed` what its header says; sent until answered, or `once`."""
        said = runs if claimed is None else claimed
        nonce = self.world.new_nonce()
        oldest, newest = min(said)[0], max(said)[0]
        is_equal = self.world.is_equal(lease.task_id)
        self.world.note(
            seen.Sampled(
                self.world.clock.now, self.epoch, lease.lease_id, lease.task_id, nonce, runs[0][0], runs[-1][0],
                oldest, newest, lie, is_equal,
            )
        )  # fmt: skip
        header = header_of(lease.lease_id, lease.task_id, said, is_equal=is_equal)
        group = SentGroup(header, payload_of(nonce, sum(length for _, length in said), **how), self.world.clock.now)
        if not once:
            self.unacknowledged[lease.lease_id] = group
        self._unsent.append(group)
        if len(self._unsent) == 1:
            self.world.clock.after(BUSY_S * self.world.rng.random() ** 4, self._send_unsent)

    def _send_unsent(self) -> None:
        if self.is_running(self._send_unsent):
            groups, self._unsent = self._unsent, []
            if self.weights.loaded > self._confirmed_version:
                self.say_alive()
            for some in in_messages(groups, lambda group: len(group.payload)):
                self._send(some)

    def _send(self, groups: list[SentGroup]) -> None:
        for group in groups:
            group.sent_at = self.world.clock.now
        headers = tuple(group.header for group in groups)
        payload = join_payloads(headers, [group.payload for group in groups])
        self.line.send(GroupsFinished(groups=headers), bytes(payload))
