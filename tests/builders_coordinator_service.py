"""A fake learner and a fake rollout server that speak with a real coordinator over real ZeroMQ."""

import asyncio
import json
from collections import deque
from contextlib import asynccontextmanager

from common.codec import Decoder, encode, pack_group
from common.messages import CoordinatorToServer, GroupsFinished, Welcome
from common.wire import open_dealer
from learner.coordinator.messages import CloseRun, CoordinatorToLearner, RunOpened, SnapshotPublished
from learner.coordinator.serving import serve
from learner.coordinator.tasks import open_tasks
from tests.builders_coordinator import (
    a_heartbeat,
    a_hello,
    a_ready,
    a_sampled_group,
    an_open_run,
    one_by_one,
    some_service_settings,
)

PATIENCE_S = 10.0


class Party:
    """One end of a conversation with the coordinator."""

    def __init__(self, dealer, union):
        self._dealer = dealer
        self._decoder = Decoder(union, max_payload_bytes=1 << 24)
        self._heard = deque()  # came, and was not asked for yet

    async def say(self, message, payload=b""):
        await self._dealer.send(encode(message, payload))

    async def hear(self, kind):
        """The next message of this kind and its payload; others are skipped. One lease or acknowledgement at a time."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                message, payload = await self._next()
                if isinstance(message, kind):
                    return message, payload

    async def _next(self):
        while not self._heard:
            message, payload = self._decoder.decode(await self._dealer.receive())
            self._heard += ((one, payload) for one in one_by_one(message))
        return self._heard.popleft()

    async def expect(self, kind):
        return (await self.hear(kind))[0]

    async def everything_until(self, kind):
        """All messages up to the next one of this kind."""
        heard = []
        async with asyncio.timeout(PATIENCE_S):
            while not heard or not isinstance(heard[-1], kind):
                heard.append((await self._next())[0])
        return heard

    async def ask(self, message, kind):
        await self.say(message)
        return await self.expect(kind)


@asynccontextmanager
async def a_learner(settings):
    async with open_dealer(settings.learner_socket) as dealer:
        yield Party(dealer, CoordinatorToLearner)


@asynccontextmanager
async def a_server(address, *, key=None, join=True, epoch="epoch-1", name="a"):
    async with open_dealer(address, key=key) as dealer:
        server = Party(dealer, CoordinatorToServer)
        if join:
            await server.ask(a_hello(name, epoch=epoch), Welcome)
            await server.say(a_ready())
            await server.say(a_heartbeat())
        yield server


def settings_in(tmp_path, **overrides):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"question {number}"}) + "\n" for number in range(20)))
    values = {
        "learner_socket": f"ipc://{tmp_path}/learner",
        "prompts": str(prompts),
        "journal": f"{tmp_path}/journal.sqlite",
    }
    return some_service_settings(**(values | overrides))


@asynccontextmanager
async def a_coordinator_serving(settings, run=None):
    """Yields the learner's end and the address for servers; the run must be closed inside."""
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        serving = group.create_task(serve(settings, open_tasks(settings.prompts, seed=settings.seed)))
        async with a_learner(settings) as learner:
            run = run or an_open_run()
            opened = await learner.ask(run, RunOpened)
            await learner.say(SnapshotPublished(version=run.version))
            yield learner, opened.listen_address
            await learner.say(CloseRun(reason="the test is over"))
            assert await serving == 0


async def finish(server, lease, **changes):
    header, payload = pack_group(a_sampled_group(lease.lease_id, lease.task_id, **changes))
    await server.say(GroupsFinished(groups=(header,)), payload)
