"""Lender: granted leases become messages once their dataset rows are there, no faster than servers read them."""

import asyncio
from collections import defaultdict
from collections.abc import Callable
from functools import partial

from common.together import in_messages
from learner.coordinator.background import Background
from learner.coordinator.decisions import GrantEvaluation, GrantLease
from learner.coordinator.mailer import Mailer
from learner.coordinator.outbound import Outbound
from learner.coordinator.tasks import Task, Tasks
from learner.coordinator.turns import Turn

ROWS_AT_ONCE = 64
LEASE_BYTES = 256  # of a lease in a message, beside its row

Grant = GrantLease | GrantEvaluation


class Lender:
    """A slow generator of rows holds up nothing but leases; a slow reader nothing but its own."""

    def __init__(
        self,
        tasks: Tasks,
        outbound: Outbound,
        mailer: Mailer,
        *,
        post: Callable[[], None],
        evaluation_tasks: Tasks | None = None,
    ) -> None:
        self._tasks = tasks
        self._evaluation_tasks = evaluation_tasks
        self._outbound = outbound
        self._mailer = mailer
        self._post = post
        self._granted = asyncio.Event()
        self._has_sent = asyncio.Event()  # all leases whose rows are there
        self._has_sent.set()
        self._waiting: list[Grant] = []  # for servers that have not read what was sent before

    def wake(self) -> None:
        """There are grants."""
        self._granted.set()

    def retry(self) -> None:
        """Look again whether those have read it that had not."""
        if self._waiting:
            self._outbound.grants.extend(self._waiting)
            self._waiting.clear()
            self._granted.set()

    async def wait_until_sent(self) -> None:
        """Returns at once while rows are waited for: a slow generator holds up nobody else."""
        await self._has_sent.wait()

    async def run(self) -> None:
        background = Background()  # the one thread that asks for rows
        try:
            while True:
                await self._granted.wait()
                self._granted.clear()
                while grants := self._next_grants():
                    made = await self._tasks_for(grants, background)
                    self._has_sent.clear()
                    await self._lend(made)
                    self._has_sent.set()
        finally:
            background.close()

    async def _lend(self, made: list[tuple[Grant, Task]]) -> None:
        """A message after the other, as long as its server reads them."""
        leases: defaultdict[str, list[tuple[GrantLease, Task]]] = defaultdict(list)
        for grant, task in made:
            if isinstance(grant, GrantLease):
                leases[grant.server_id].append((grant, task))
            elif self._must_wait(grant):
                self._waiting.append(grant)
            else:
                self._outbound.lend_evaluation(grant, task)
                self._post()
        turn = Turn()
        for server_id, granted in leases.items():
            for some in in_messages(granted, lambda one: LEASE_BYTES + len(one[1].row)):
                if self._must_wait(some[0][0]):
                    self._waiting += (grant for grant, _ in some)
                else:
                    self._outbound.lend(server_id, some)
                    self._post()
                if turn.is_over:
                    await turn.next()

    def _next_grants(self) -> list[Grant]:
        grants: list[Grant] = []
        while self._outbound.grants and len(grants) < ROWS_AT_ONCE:
            grant = self._outbound.grants.popleft()
            (self._waiting if self._must_wait(grant) else grants).append(grant)
        return grants

    def _must_wait(self, grant: Grant) -> bool:
        session = self._outbound.sessions.of_server(grant.server_id)
        return session is not None and self._mailer.is_behind(session.peer)

    async def _tasks_for(self, grants: list[Grant], background: Background) -> list[tuple[Grant, Task]]:
        if all(self._source_of(grant).are_in_memory for grant in grants):
            return self._make_tasks(grants)  # the way to a thread and back can take longer than all else of a lease
        return await background.run(partial(self._make_tasks, grants))

    def _make_tasks(self, grants: list[Grant]) -> list[tuple[Grant, Task]]:
        return [(grant, self._source_of(grant).task(grant.task_id)) for grant in grants]

    def _source_of(self, grant: Grant) -> Tasks:
        if isinstance(grant, GrantLease):
            return self._tasks
        assert self._evaluation_tasks is not None, "the rules grant evaluation tasks only where there are some"
        return self._evaluation_tasks
