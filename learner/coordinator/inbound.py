"""Inbound: messages of rollout servers become events of the core. No socket, no clock, no waiting."""

import logging

from common.codec import Frame, ProtocolError
from common.messages import (
    PROTOCOL_VERSION,
    Evaluated,
    EvaluationFailed,
    Finished,
    GroupsFinished,
    Heartbeat,
    Hello,
    LeaseFailed,
    Leaving,
    Ready,
    Refused,
    ServerToCoordinator,
    Welcome,
)
from common.wire import Peer
from learner.coordinator.admission import Admission
from learner.coordinator.core import Coordinator
from learner.coordinator.decisions import Quarantine
from learner.coordinator.messages import OpenRun
from learner.coordinator.outbound import Outbound, cut
from learner.coordinator.records import Claim
from learner.coordinator.service_settings import ServiceSettings
from learner.coordinator.sessions import GreetingRefused, Session

logger = logging.getLogger(__name__)

JOINING_TIMEOUT_S = 1800.0  # silence of a server that is not ready yet: loading a large model takes long


class Inbound:
    """Everything rollout servers say, strangers included."""

    def __init__(
        self, settings: ServiceSettings, core: Coordinator, run: OpenRun, outbound: Outbound, *, session: str
    ) -> None:
        self.settings = settings
        self.core = core
        self.run = run
        self.outbound = outbound
        self.session = session  # random per coordinator start
        self._admission = Admission(
            group_size=settings.group_size, vocab_size=run.vocab_size, max_model_len=run.max_model_len
        )

    def hear(self, peer: Peer, message: ServerToCoordinator, payload: Frame, now: float) -> None:
        """One message."""
        if self.outbound.is_blocked(peer):
            return
        if isinstance(message, Hello):
            self._greet(peer, message, now)
            return
        session = self.outbound.sessions.of_peer(peer)
        if session is None:
            self.outbound.say(
                peer, Refused(reason="the coordinator does not know this connection; say Hello", retry=True)
            )
            return
        session.heard_at = now
        self._hear_server(session, message, payload, now)

    def hear_garbage(self, peer: Peer, why: str, now: float) -> None:
        """Frames that are no message: told, counted, and after repeats not listened to any more."""
        if self.outbound.is_blocked(peer):
            return
        session = self.outbound.sessions.of_peer(peer)
        who = (
            session.server_id
            if session
            else f"key {peer.key[:8]}"
            if peer.key
            else f"connection {peer.routing_id.hex()}"
        )
        logger.warning("%s sent what cannot be read: %s", who, why)
        self.outbound.say(peer, Refused(reason=cut(f"this cannot be read: {why}"), retry=True))
        decisions = self.core.garbage(who, why, now)
        self.outbound.carry_out(decisions)
        if session is None and any(isinstance(decision, Quarantine) for decision in decisions):
            self.outbound.block(peer)

    def tick(self, now: float) -> None:
        """About once a second, after everything that had arrived was heard."""
        self.outbound.carry_out(self.core.tick(now))
        for session in self.outbound.sessions:
            if not session.ready and now - session.heard_at > JOINING_TIMEOUT_S:
                self.outbound.sessions.end(session)

    def _hear_server(self, session: Session, message: ServerToCoordinator, payload: Frame, now: float) -> None:
        server_id = session.server_id
        match message:
            case Ready():
                self._ready(session, message, now)
            case Heartbeat():
                self._heartbeat(session, message, now)
            case GroupsFinished():
                self._groups_finished(session, message, payload, now)
            case LeaseFailed():
                kind, reason = message.kind, message.reason
                self.outbound.carry_out(self.core.lease_failed(server_id, message.lease_id, kind, reason, now))
            case Evaluated() | EvaluationFailed():
                self._evaluated(session, message, now)
            case Leaving():
                logger.info("server %s leaves: %s", server_id, message.reason)
                self.outbound.sessions.end(session)
                self.outbound.carry_out(self.core.server_left(server_id, message.reason, now))

    def _greet(self, peer: Peer, hello: Hello, now: float) -> None:
        if self.core.closed:
            self.outbound.say(peer, Finished(reason=cut(self.core.closed)))
            return
        if hello.protocol != PROTOCOL_VERSION:
            reason = (
                f"the server speaks protocol {hello.protocol}, the learner {PROTOCOL_VERSION}; "
                "install the same version of countercurrent on both"
            )
            logger.warning("server %r refused: %s", hello.server, reason)
            self.outbound.say(peer, Refused(reason=reason))
            return
        is_new = self.outbound.sessions.of_peer(peer) is None
        try:
            session = self.outbound.sessions.greet(hello, peer=peer, now=now)
        except GreetingRefused as error:
            self.outbound.say(peer, Refused(reason=str(error), retry=True))
            return
        if is_new:
            logger.info("server %s says hello", session.server_id)
        self.outbound.say(peer, self._welcome())

    def _welcome(self) -> Welcome:
        return Welcome(
            run_id=self.settings.run_id,
            session=self.session,
            model=self.settings.model,
            model_fingerprint=self.run.model_fingerprint,
            tokenizer_fingerprint=self.run.tokenizer_fingerprint,
            dtype=self.run.dtype,
            environments=self.settings.environments,
            max_model_len=self.run.max_model_len,
            max_new_tokens=self.settings.max_new_tokens,
            temperature=self.settings.temperature,
            weights_address=self.run.weights_address,
            published_version=self.core.book.published_version,
            evaluation_hold_s=self.settings.evaluation.hold_s if self.settings.evaluation is not None else 0.0,
            adapters=self.run.adapters,
            relay_weights=self.settings.relay_weights,
        )

    def _ready(self, session: Session, ready: Ready, now: float) -> None:
        server_id = session.server_id
        mismatch = self._mismatch(ready)
        if mismatch:
            logger.warning("server %s refused: %s", server_id, mismatch)
            self.outbound.say(session.peer, Refused(reason=cut(mismatch)))
            self.outbound.sessions.end(session)
            self.outbound.carry_out(self.core.server_left(server_id, mismatch, now))
            return
        session.ready = True
        logger.info("server %s is ready for %d groups", server_id, ready.capacity_groups)
        decisions = self.core.server_ready(
            server_id,
            capacity_groups=ready.capacity_groups,
            capacity_bytes=ready.capacity_bytes,
            claims=self._proven(session, ready),
            now=now,
        )
        self.outbound.carry_out(decisions)

    def _proven(self, session: Session, ready: Ready) -> list[Claim]:
        """Of the leases that the server says it holds, those that a coordinator of this run granted to it."""
        held = [one for one in ready.held if self.outbound.proofs.holds(one, session.holder)]
        if len(held) < len(ready.held):
            logger.warning("server %s claims %d leases without proof", session.server_id, len(ready.held) - len(held))
        return [Claim(lease_id=one.lease_id, task_id=one.task_id, min_version=one.min_version) for one in held]

    def _mismatch(self, ready: Ready) -> str:
        """Why the server cannot sample for this run; empty when it can."""
        for what, server, learner in (
            ("model", ready.model_fingerprint, self.run.model_fingerprint),
            ("tokenizer", ready.tokenizer_fingerprint, self.run.tokenizer_fingerprint),
        ):
            if server != learner:
                return (
                    f"the server's {what} has fingerprint {server}, the learner's {learner}; "
                    f"load {self.settings.model}, the same revision, on both"
                )
        return ""

    def _heartbeat(self, session: Session, heartbeat: Heartbeat, now: float) -> None:
        _log_service(session, heartbeat)
        _log_liar(session, heartbeat)
        session.heartbeat = heartbeat
        decisions = self.core.heartbeat(
            session.server_id,
            progress=heartbeat.progress,
            loaded_version=heartbeat.loaded_version,
            out_of_service=heartbeat.out_of_service,
            holding=heartbeat.holding,
            now=now,
        )
        self.outbound.carry_out(decisions)
        self.outbound.pulse(session, now)

    def _groups_finished(self, session: Session, message: GroupsFinished, payload: Frame, now: float) -> None:
        """Each group is taken or refused by itself, in order."""
        server_id, headers = session.server_id, message.groups
        if not any(self.core.book.lease_of(server_id, header.lease_id) for header in headers):  # floods must be cheap
            for header in headers:
                self.outbound.carry_out(self.core.refuse_group(server_id, header.lease_id, now))
            return
        try:
            groups = self._admission.judge(headers, payload, newest_version=self.core.version)
        except ProtocolError as error:
            self.hear_garbage(session.peer, str(error), now)
            return
        for header, group in zip(headers, groups, strict=True):
            if isinstance(group, ProtocolError):
                self._group_invalid(server_id, header.lease_id, group, now)
            else:
                self.outbound.carry_out(self.core.group_finished(server_id, group, now))

    def _group_invalid(self, server_id: str, lease_id: int, error: ProtocolError, now: float) -> None:
        logger.warning("server %s, lease %d: %s", server_id, lease_id, error)
        self.outbound.carry_out(self.core.group_invalid(server_id, lease_id, "invalid", cut(str(error)), now))

    def _evaluated(self, session: Session, message: Evaluated | EvaluationFailed, now: float) -> None:
        server_id, evaluation_id = session.server_id, message.evaluation_id
        if isinstance(message, EvaluationFailed):
            logger.info("server %s, evaluation: %s: %s", server_id, message.kind, message.reason)
            self.outbound.carry_out(self.core.evaluation_failed(server_id, evaluation_id, message.kind, now))
            return
        decisions = self.core.evaluation_finished(
            server_id,
            evaluation_id,
            task_id=message.task_id,
            version=message.version,
            episodes=message.episodes,
            now=now,
        )
        self.outbound.carry_out(decisions)


def _log_liar(session: Session, heartbeat: Heartbeat) -> None:
    """When one is named."""
    before = session.heartbeat.lying_relay if session.heartbeat is not None else ""
    if heartbeat.lying_relay and heartbeat.lying_relay != before:
        logger.error(
            "server %s was sent wrong weights by the relay of %s, refused them and pulls from the learner: one of the "
            "two is broken or lies; look at the memory and the network of %s, or revoke its key",
            *(session.server_id, heartbeat.lying_relay, heartbeat.lying_relay),
        )


def _log_service(session: Session, heartbeat: Heartbeat) -> None:
    """When it changes."""
    before = session.heartbeat.out_of_service if session.heartbeat is not None else ""
    if heartbeat.out_of_service and heartbeat.out_of_service != before:
        logger.error("server %s is out of service: %s", session.server_id, heartbeat.out_of_service)
    elif before and not heartbeat.out_of_service:
        logger.warning("server %s is back in service at version %d", session.server_id, heartbeat.loaded_version)
