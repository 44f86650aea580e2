"""The coordinator's status as a message: what the learner shows and logs once a second."""

from collections.abc import Mapping

from common.snapshot import NO_VERSION
from learner.coordinator.core import Coordinator
from learner.coordinator.explain import what_all_servers_wait_for, what_the_learner_waits_for
from learner.coordinator.messages import CoordinatorStatus, ServerStatus
from learner.coordinator.sessions import Session, Sessions
from learner.coordinator.token_ages import TokenAges


def status_of(
    core: Coordinator,
    sessions: Sessions,
    ages: TokenAges,
    now: float,
    *,
    listen_address: str,
    strangers: Mapping[str, int],
) -> CoordinatorStatus:
    """`strangers`: connections and messages that the socket did not take, by reason."""
    counts = core.counts()
    refused = {**counts.refused, **strangers}
    return CoordinatorStatus(
        servers=tuple(_server_status(core, session, now) for session in sessions),
        leased=counts.leased,
        running=counts.running,
        queued=counts.queued,
        queued_bytes=core.book.queue.num_bytes,
        trained=counts.trained,
        failed=counts.failed,
        cancelled=counts.cancelled,
        expired=counts.expired,
        refused=refused,
        depth=core.book.bounds.depth.leases,
        staleness_tokens=dict(ages.staleness),
        in_flight_tokens=dict(ages.in_flight),
        in_queue_tokens=dict(ages.in_queue),
        waiting_for=what_the_learner_waits_for(core, now, listen_address=listen_address),
        held_by=core.book.bounds.held_by() or "",
        evaluation=core.evaluations.describe(),
        servers_wait_for=what_all_servers_wait_for(core),
    )


def _server_status(core: Coordinator, session: Session, now: float) -> ServerStatus:
    member, heartbeat = core.members.get(session.server_id), session.heartbeat
    return ServerStatus(
        server=session.server_id,
        loaded_version=heartbeat.loaded_version if heartbeat else NO_VERSION,
        running_groups=len(member.leases) if member else 0,
        generated_tokens=heartbeat.generated_tokens if heartbeat else 0,
        busy_s=heartbeat.busy_s if heartbeat else 0.0,
        paused_s=heartbeat.paused_s if heartbeat else 0.0,
        silent_s=max(0.0, now - session.heard_at),
        doing=heartbeat.doing if heartbeat else ("ready" if session.ready else "loading the model"),
        out_of_service=heartbeat.out_of_service if heartbeat else "",
        updates=heartbeat.updates if heartbeat else 0,
        pulled_bytes=heartbeat.pulled_bytes if heartbeat else 0,
    )
