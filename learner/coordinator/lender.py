"""Lender: granted leases become messages once their dataset rows are there, no faster than servers read them."""

import asyncio
from collections.abc import Callable
from functools import partial

from learner.coordinator.background import in_thread
from learner.coordinator.decisions import GrantLease
from learner.coordinator.mailer import Mailer
from learner.coordinator.outbound import Outbound
from learner.coordinator.tasks import Task, TaskSource

ROWS_AT_ONCE = 64


class Lender:
    """A slow generator of rows holds up nothing but leases; a slow reader nothing but its own."""

    def __init__(self, tasks: TaskSource, outbound: Outbound, mailer: Mailer, *, post: Callable[[], None]) -> None:
        self._tasks = tasks
        self._outbound = outbound
        self._mailer = mailer
        self._post = post
        self._granted = asyncio.Event()
        self._waiting: list[GrantLease] = []  # for servers that have not read what was sent before

    def wake(self) -> None:
        """There are grants."""
        self._granted.set()

    def retry(self) -> None:
        """Look again whether those have read it that had not."""
        if self._waiting:
            self._outbound.grants.extend(self._waiting)
            self._waiting.clear()
            self._granted.set()

    async def run(self) -> None:
        while True:
            await self._granted.wait()
            self._granted.clear()
            while grants := self._next_grants():
                for grant, task in await in_thread(partial(self._make_tasks, grants)):
                    if self._must_wait(grant):
                        self._waiting.append(grant)
                    else:
                        self._outbound.lend(grant, task)
                        self._post()

    def _next_grants(self) -> list[GrantLease]:
        grants: list[GrantLease] = []
        while self._outbound.grants and len(grants) < ROWS_AT_ONCE:
            grant = self._outbound.grants.popleft()
            (self._waiting if self._must_wait(grant) else grants).append(grant)
        return grants

    def _must_wait(self, grant: GrantLease) -> bool:
        session = self._outbound.sessions.of_server(grant.server_id)
        return session is not None and self._mailer.is_behind(session.peer)

    def _make_tasks(self, grants: list[GrantLease]) -> list[tuple[GrantLease, Task]]:
        return [(grant, self._tasks.task(grant.task_id)) for grant in grants]
