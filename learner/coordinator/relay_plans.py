"""RelayPlans: the RelayTree of the servers that take part at the moment; each is told when something is new for it."""

from collections.abc import Callable

from common.messages import RelayPlan
from common.wire import Peer
from learner.coordinator.outbound import Outbound
from learner.coordinator.relays import RelayServer, RelayTree
from learner.coordinator.sessions import Session

FROM_THE_LEARNER = RelayPlan(source=None, admitted=())


class RelayPlans:
    """No socket, no clock, no waiting."""

    def __init__(self, fan_out: int, outbound: Outbound) -> None:
        """fan_out: 0: nobody is told anything."""
        self._tree = RelayTree(fan_out) if fan_out else None
        self._outbound = outbound
        self._told: dict[str, tuple[Peer, RelayPlan]] = {}  # by server; another connection may not have heard it

    def tell(self, now: float, is_revoked: Callable[[Peer], bool]) -> None:
        """About once a second. Those nearest to the learner are told first, so that they let the others in."""
        if self._tree is None:
            return
        sessions = {session.server_id: session for session in self._outbound.sessions if session.ready}
        plans = self._tree.plans(
            [_relay_of(one) for one in sessions.values() if self._takes_part(one, now) and not is_revoked(one.peer)]
        )
        for server_id, session in sorted(sessions.items(), key=lambda item: _level(plans.get(item[0]))):
            plan = plans.get(server_id)
            if plan is None and server_id in self._told:
                plan = FROM_THE_LEARNER
            if plan is not None and self._told.get(server_id) != (session.peer, plan):
                self._outbound.say(session.peer, plan)
                self._told[server_id] = session.peer, plan
        self._told = {server_id: told for server_id, told in self._told.items() if server_id in sessions}

    def _takes_part(self, session: Session, now: float) -> bool:
        beat = session.heartbeat
        has_address = beat is not None and beat.relay_address.startswith("tcp://")
        is_heard = now - session.heard_at <= self._outbound.settings.rules.notice_timeout_s
        return beat is not None and has_address and not beat.out_of_service and is_heard


def _relay_of(session: Session) -> RelayServer:
    assert session.heartbeat is not None
    return RelayServer(
        server_id=session.server_id,
        address=session.heartbeat.relay_address,
        relay_key=session.heartbeat.relay_key,
        own_key=bytes.fromhex(session.peer.key),
    )


def _level(plan: RelayPlan | None) -> int:
    return plan.source.level if plan is not None and plan.source is not None else 0
