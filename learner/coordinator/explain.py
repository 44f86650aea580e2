"""Who waits for whom, in words: nobody waits silently, and every wait names its other end."""

from learner.coordinator.core import Coordinator
from learner.coordinator.members import Member

MAX_TEXT = 2000
MAX_NAMED = 5


def what_the_learner_waits_for(coordinator: Coordinator, now: float, *, listen_address: str) -> str:
    """Why there is no batch yet; empty when one is complete."""
    if coordinator.book.batch() or coordinator.closed:
        return ""
    if not coordinator.members:
        return _cut(f"no rollout server has joined at {listen_address}")
    lease = coordinator.book.awaited()
    if lease is not None:
        member = coordinator.members[lease.server_id]
        text = (
            f"server {member.server_id}: {len(member.leases)} groups running, lease {lease.lease_id} (task "
            f"{lease.task_id}) since {now - lease.granted_at:.0f} s"
        )
        if lease.min_version > coordinator.book.published_version:
            text += (
                f", which needs snapshot {lease.min_version}; the learner's snapshot server has not published it yet"
            )
        elif lease.min_version > member.loaded_version:
            text += (
                f", which needs snapshot {lease.min_version}; the learner's snapshot server has published it, "
                f"the server has {_version(member.loaded_version)}"
            )
        silent_s = now - member.heard_at
        if silent_s > coordinator.settings.notice_timeout_s:
            text += f"; nothing heard of it for {silent_s:.0f} s"
        return _cut(text + _aside(coordinator))
    members = coordinator.members.values()
    reasons = [text for member in members if (text := _pause(coordinator, member, now))][:MAX_NAMED]
    return _cut("; ".join(reasons or ["leases to be granted"]) + _aside(coordinator))


def what_all_servers_wait_for(coordinator: Coordinator) -> str:
    """What keeps new leases away from every server; empty when nothing does."""
    return _cut(coordinator.hold())


def what_a_server_waits_for(coordinator: Coordinator, server_id: str, now: float) -> str:
    """What keeps new leases away from this server; empty when nothing does."""
    member = coordinator.members.get(server_id)
    if member is None:
        return "this server is not ready"
    return _cut(coordinator.hold() or _pause(coordinator, member, now))


def _pause(coordinator: Coordinator, member: Member, now: float) -> str:
    if member.out_of_service:
        return f"server {member.server_id} is out of service: {member.out_of_service}"
    if member.paused_until <= now:
        return _environments_down(coordinator, member, now)
    return (
        f"server {member.server_id} is paused for {member.paused_until - now:.0f} s after {member.failures_in_a_row} "
        f"failures in a row, the last one: {member.last_failure}"
    )


def _environments_down(coordinator: Coordinator, member: Member, now: float) -> str:
    names = coordinator.settings.environments
    return "; ".join(
        f"environment {names[index]}, down as seen from server {member.server_id}, tried again in "
        f"{max(0.0, down.paused_until - now):.0f} s: {down.reason}"
        for index, down in list(member.down.items())[:MAX_NAMED]
    )


def _aside(coordinator: Coordinator) -> str:
    """What was sampled and will not be in the batch that is waited for."""
    told = [coordinator.book.sampling.describe(coordinator.version)]
    if parked := coordinator.book.tasks.parked:
        task_id = next(reversed(parked))
        told.append(f"{len(parked)} tasks parked, the last one: task {task_id}: {parked[task_id]}")
    words = "; ".join(filter(None, told))
    return f" ({words})" if words else ""


def _version(version: int) -> str:
    return "none" if version < 0 else str(version)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 3] + "..."
