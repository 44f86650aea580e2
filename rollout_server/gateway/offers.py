"""Offers: episodes that wait for an agent, and agents that wait for an episode; first come, first served."""

import asyncio
from collections import deque
from typing import Any

Invitation = dict[str, Any]
"""What an agent is told of its episode."""


class _Offer:
    def __init__(self, invitation: Invitation) -> None:
        self.invitation = invitation
        self.taken: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Offers:
    """By the name of a queue."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[_Offer]] = {}
        self._new = asyncio.Condition()
        self.num_waiting = 0  # agents

    def __repr__(self) -> str:
        return (
            f"<Offers { ({name: len(offers) for name, offers in self._waiting.items()}) }, {self.num_waiting} agents>"
        )

    async def offer(self, queue: str, invitation: Invitation) -> None:
        """Returns when an agent has taken it. Cancelled before, it is offered no more."""
        offer = _Offer(invitation)
        async with self._new:
            self._waiting.setdefault(queue, deque()).append(offer)
            self._new.notify_all()
        await offer.taken

    async def take(self, queue: str, *, timeout_s: float) -> Invitation | None:
        """The episode that has waited longest; None when none came in time."""
        self.num_waiting += 1
        try:
            async with asyncio.timeout(timeout_s), self._new:
                while (invitation := self._first(queue)) is None:
                    await self._new.wait()
                return invitation
        except TimeoutError:
            return None
        finally:
            self.num_waiting -= 1

    def _first(self, queue: str) -> Invitation | None:
        offers = self._waiting.get(queue)
        while offers:
            offer = offers.popleft()
            if not offer.taken.done():
                offer.taken.set_result(None)
                return offer.invitation
        return None
