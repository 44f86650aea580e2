"""A learner that says what the test tells it to, over real sockets, and a rollout server with the table engine."""

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from common.canary import Canary, canary_prompt, make_canary
from common.codec import Decoder, encode, unpack_groups
from common.environments import Environments
from common.events import EventLog
from common.messages import (
    PROTOCOL_VERSION,
    AdapterNeeds,
    GroupsFinished,
    Heartbeat,
    Hello,
    Lease,
    Leases,
    Message,
    Ready,
    ServerToCoordinator,
    Welcome,
)
from common.snapshot import TensorSpec, build_manifest, encode_manifest
from common.together import split_payload
from common.trajectory import Group
from common.weight_messages import ChunkReply, ManifestReply, ManifestRequest, ServerToSnapshots
from common.wire import Peer, Router, open_dealer, open_router
from rollout_server.busy import MeteredEngine
from rollout_server.episodes import EpisodeRunner
from rollout_server.greeting import join
from rollout_server.server import RolloutServer
from rollout_server.table_engine import TABLE_TENSOR, TableEngine
from rollout_server.weight_receiver import WeightReceiver
from tests.rollout_server.test_episodes import ScriptedEnvironment
from tests.rollout_server.tokenizer_twin import EOS_ID, CharacterTokenizer

PATIENCE_S = 20.0
TOKENIZER = CharacterTokenizer()
V = TOKENIZER.vocab_size
HELLO = Hello(protocol=PROTOCOL_VERSION, server="a", epoch="epoch-1")
READY = Ready(model_fingerprint="m", tokenizer_fingerprint="t", capacity_groups=8, capacity_bytes=1 << 30)


def canary_of(table: np.ndarray) -> Canary | None:
    prompt = canary_prompt(V, 64)
    assert prompt is not None
    logprobs = table - np.log(np.exp(table.astype(np.float64)).sum(axis=1, keepdims=True))
    return make_canary(prompt.tolist(), logprobs[prompt[:-1], prompt[1:]].astype(np.float32), 1e-4)


class FakeLearner:
    """Both sockets of a learner: leases and groups, manifests and chunks."""

    def __init__(self, router: Router, snapshots: Router, session: str) -> None:
        self.session = session
        self.published = 0
        self.hold_s = 0.0
        self.manifests_asked = 0
        self.heard: list[Message] = []
        self._groups: deque[Group] = deque()  # that came with the last one that was heard
        self._router = router
        self._snapshots = snapshots
        self._decoder = Decoder(ServerToCoordinator, max_payload_bytes=1 << 20)
        self._queue: asyncio.Queue[tuple[Message, Any]] = asyncio.Queue()
        self._peer: Peer | None = None
        self.address = router.address

    @property
    def run_id(self) -> str:
        return f"run.{self.session}"

    def welcome(self, **changes: Any) -> Welcome:
        fields: dict[str, Any] = {
            "run_id": self.run_id,
            "session": self.session,
            "model": "table",
            "model_fingerprint": "m",
            "tokenizer_fingerprint": "t",
            "dtype": "float32",
            "environments": Environments.at(ScriptedEnvironment.url).specs,
            "max_model_len": 64,
            "max_new_tokens": 8,
            "temperature": 1.0,
            "weights_address": self._snapshots.address,
            "published_version": self.published,
            "evaluation_hold_s": self.hold_s,
        }
        return Welcome(**fields | changes)

    async def listen(self) -> None:
        while True:
            for incoming in await self._router.receive():
                self._peer = incoming.peer
                message, payload = self._decoder.decode(incoming.frames)
                self.heard.append(message)
                self._queue.put_nowait((message, bytes(payload)))

    async def serve_snapshots(self) -> None:
        decoder = Decoder(ServerToSnapshots, max_payload_bytes=0)
        while True:
            for incoming in await self._snapshots.receive():
                request, _ = decoder.decode(incoming.frames)
                self.manifests_asked += isinstance(request, ManifestRequest)
                version = self.published if isinstance(request, ManifestRequest) else request.version
                table = np.random.default_rng(version).normal(size=(V, V)).astype("<f4")
                data = table.tobytes()
                specs = (TensorSpec(TABLE_TENSOR, (V, V), "float32", 0),)
                manifest = build_manifest(
                    memoryview(data), specs, run_id=self.run_id, version=version, canary=canary_of(table)
                )
                if isinstance(request, ManifestRequest):
                    answer = encode(ManifestReply(version=manifest.version), encode_manifest(manifest))
                else:
                    answer = encode(ChunkReply(version=manifest.version, index=0), data)
                self._snapshots.send(incoming.peer, answer)

    def say(self, message: Message) -> None:
        assert self._peer is not None
        self._router.send(self._peer, encode(message))

    async def hear(self, kind: type[Message]) -> Any:
        """The next message of this kind; others are skipped."""
        return (await self._next(kind))[0]

    async def _next(self, kind: type[Message]) -> tuple[Any, bytes]:
        while True:
            message, payload = await self._queue.get()
            if isinstance(message, kind):
                return message, payload

    async def hear_hello(self) -> None:
        """Said now, and otherwise always the same."""
        hello = await self.hear(Hello)
        assert hello.said_us > 0
        assert msgspec.structs.replace(hello, said_us=0) == HELLO

    async def hear_group(self) -> Group:
        """The next one, however many came with it."""
        if not self._groups:
            message, payload = await self._next(GroupsFinished)
            payloads = split_payload(message.groups, payload)
            self._groups += unpack_groups(message.groups, b"".join(payloads))
        return self._groups.popleft()

    async def hear_heartbeat(self, **fields: Any) -> Heartbeat:
        """The next one with these values."""
        while True:
            heartbeat = await self.hear(Heartbeat)
            if all(getattr(heartbeat, name) == value for name, value in fields.items()):
                return heartbeat

    def lease(self, lease_id: int = 0, **changes: Any) -> None:
        self.lease_all(a_lease(lease_id, **changes))

    def lease_all(self, *leases: Lease) -> None:
        self.say(Leases(leases=leases))


def a_lease(lease_id: int = 0, **changes: Any) -> Lease:
    fields: dict[str, Any] = {
        "lease_id": lease_id,
        "task_id": 100 + lease_id,
        "environment": ScriptedEnvironment.url,
        "row": json.dumps({"prompt": "12+3="}).encode(),
        "group_size": 2,
        "seed": 11,
        "min_version": 0,
        "max_group_bytes": 1 << 16,
        "proof": f"proof {lease_id}".encode(),
    }
    return Lease(**fields | changes)


@asynccontextmanager
async def a_learner(address: str = "tcp://127.0.0.1:0", session: str = "1") -> AsyncIterator[FakeLearner]:
    async with (
        asyncio.timeout(PATIENCE_S),
        open_router(address, max_frame_bytes=1 << 20) as router,
        open_router("tcp://127.0.0.1:0", max_frame_bytes=1 << 20) as snapshots,
        asyncio.TaskGroup() as tasks,
    ):
        learner = FakeLearner(router, snapshots, session)
        serving = [tasks.create_task(learner.listen()), tasks.create_task(learner.serve_snapshots())]
        yield learner
        for task in serving:
            task.cancel()


async def serve(
    address: str,
    tmp_path: Path,
    environments: Mapping[str, Any],
    *,
    step_s: float = 0.0,
    engine_type: type[TableEngine] = TableEngine,
) -> None:
    """What the command does, with the table engine in the place of vLLM."""
    async with AsyncExitStack() as stack:
        events = stack.enter_context(closing(EventLog(tmp_path / "events.jsonl", "rollout_server")))
        dealer = await stack.enter_async_context(open_dealer(address))
        welcome = await join(dealer, HELLO)
        engine = MeteredEngine(engine_type(vocab_size=V, max_model_len=64, eos_id=EOS_ID, step_s=step_s), events)
        receiver = stack.enter_context(closing(WeightReceiver(engine, events)))

        def runner(welcome: Welcome) -> EpisodeRunner:
            return EpisodeRunner(
                engine,
                environments,
                TOKENIZER,
                temperature=welcome.temperature,
                max_new_tokens=welcome.max_new_tokens,
                max_model_len=welcome.max_model_len,
                wait_for_version=receiver.wait_for_version,
            )

        server = RolloutServer(
            dealer=dealer, key=None, engine=engine, receiver=receiver, runner=runner, hello=HELLO, ready=READY,
            events=events,
        )  # fmt: skip
        await server.run(welcome)


@asynccontextmanager
async def a_joined_server(
    learner: FakeLearner,
    tmp_path: Path,
    environment: ScriptedEnvironment | None = None,
    *,
    step_s: float = 0.0,
    engine_type: type[TableEngine] = TableEngine,
    hold_s: float = 0.0,
    adapters: AdapterNeeds | None = None,
) -> AsyncIterator[asyncio.Task[None]]:
    """Greeted and ready; the run must be finished, or the task be cancelled, inside."""
    learner.hold_s = hold_s
    environments = {ScriptedEnvironment.url: environment or ScriptedEnvironment()}
    serving = asyncio.create_task(
        serve(learner.address, tmp_path, environments, step_s=step_s, engine_type=engine_type)
    )
    try:
        await learner.hear_hello()
        learner.say(learner.welcome(adapters=adapters))
        assert await learner.hear(Ready) == READY
        yield serving
    finally:
        serving.cancel()
        await asyncio.wait({serving})
