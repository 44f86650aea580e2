"""A process that receives weights and says so.

python -m tests.benchmarks.push_receiver (receive ADDRESS TRANSPORT | subscribe ADDRESS BYTES)

Reads a version per line; answers each with a line once that version is there.
"""

import asyncio
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import numpy as np
import zmq

from common.events import EventLog
from common.wire import open_dealer
from rollout_server.inference import LocalSnapshot, WeightUpdate
from rollout_server.nearest_snapshots import TRANSPORTS, TransportName
from rollout_server.table_engine import TableEngine
from rollout_server.weight_receiver import WeightReceiver

RUN_ID = "run.1"


class IdleEngine(TableEngine):
    """Applies nothing: what is measured ends where the engine begins."""

    async def load_weights(self, snapshot: LocalSnapshot) -> WeightUpdate:
        self.loaded_version = snapshot.manifest.version
        return WeightUpdate(version=self.loaded_version, pause_s=0.0)


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


async def receive(address: str, transport: TransportName) -> None:
    engine = IdleEngine(vocab_size=2, max_model_len=8, eos_id=0)
    with (
        tempfile.TemporaryDirectory() as directory,
        closing(EventLog(Path(directory) / "events.jsonl", "rollout_server")) as events,
        closing(WeightReceiver(engine, events, transport=TRANSPORTS[transport])) as receiver,
    ):
        async with open_dealer(address) as dealer, asyncio.TaskGroup() as tasks:
            await receiver.follow(RUN_ID)
            running = tasks.create_task(receiver.run(dealer))
            say("ready")
            while line := await asyncio.to_thread(sys.stdin.readline):
                await receiver.announce(int(line))
                await receiver.wait_for_version(int(line))
                say(line.strip())
            running.cancel()


def subscribe(address: str, num_bytes: int) -> None:
    """The control: chunks from a PUB socket into warm memory, and nothing else."""
    memory = np.zeros(num_bytes, np.uint8)
    with zmq.Context() as context, context.socket(zmq.SUB) as socket:
        socket.set(zmq.RCVHWM, 0)
        socket.set(zmq.LINGER, 0)
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        socket.connect(address)
        socket.recv()
        say("ready")
        while line := sys.stdin.readline():
            received = 0
            while received < num_bytes:
                frame = socket.recv(copy=False)
                if len(frame.buffer) > 1:  # the short ones only look for subscribers
                    memory[received : received + len(frame.buffer)] = np.frombuffer(frame.buffer, np.uint8)
                    received += len(frame.buffer)
            say(line.strip())


if __name__ == "__main__":
    if sys.argv[1] == "receive":
        asyncio.run(receive(*sys.argv[2:]))
    else:
        subscribe(sys.argv[2], int(sys.argv[3]))
