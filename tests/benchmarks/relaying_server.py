"""A process that receives weights, gives them on, and has something else to do meanwhile.

python -m tests.benchmarks.relaying_server ADDRESS [KEY FILE]

Says where its relay listens and its public key in hexadecimal. Then it reads lines, and answers each with one:
a RelayPlan in hexadecimal MessagePack; or a version, answered once it is there with
"bytes pulled from the learner, bytes pulled from relays, pieces of work done, seconds, longest wait for a piece".
"""

import asyncio
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import msgspec

from common.events import EventLog
from common.keys import load_client_key
from common.messages import RelayPlan
from common.wire import open_dealer
from rollout_server.nearest_snapshots import TRANSPORTS
from rollout_server.relay import Relaying, open_relay
from rollout_server.weight_receiver import WeightReceiver
from tests.benchmarks.push_receiver import RUN_ID, IdleEngine, say

PIECE_S = 0.0005  # of the event loop's time: as the front of an engine has to do for its requests
PAUSE_S = 0.02


class Work:
    """Pieces of work in the event loop, with pauses."""

    def __init__(self) -> None:
        self.done = 0
        self.longest_wait_s = 0.0  # beyond the pause, to be set to 0 by whoever wants to know

    async def run(self) -> None:
        while True:
            until_s = time.thread_time() + PIECE_S
            while time.thread_time() < until_s:
                pass
            self.done += 1
            paused_s = time.monotonic()
            await asyncio.sleep(PAUSE_S)
            self.longest_wait_s = max(self.longest_wait_s, time.monotonic() - paused_s - PAUSE_S)


async def receive(address: str, key_file: str = "") -> None:
    key = load_client_key(Path(key_file)) if key_file else None
    engine, relaying, work = IdleEngine(vocab_size=2, max_model_len=8, eos_id=0), Relaying(key), Work()
    with (
        tempfile.TemporaryDirectory() as directory,
        closing(EventLog(Path(directory) / "events.jsonl", "rollout_server")) as events,
        closing(WeightReceiver(engine, events, transport=TRANSPORTS["zeromq"], relaying=relaying)) as receiver,
    ):
        async with (
            open_relay(relaying, "tcp://127.0.0.1:0"),
            open_dealer(address, key=key) as dealer,
            asyncio.TaskGroup() as tasks,
        ):
            await receiver.follow(RUN_ID)
            running = [tasks.create_task(receiver.run(dealer)), tasks.create_task(work.run())]
            say(f"{relaying.address} {relaying.public_key.hex()}")
            before = (0, 0)
            while line := (await asyncio.to_thread(sys.stdin.readline)).strip():
                if not line.isdecimal():
                    relaying.follow(msgspec.msgpack.decode(bytes.fromhex(line), type=RelayPlan))
                    say("followed")
                    continue
                done, start_s, work.longest_wait_s = work.done, time.monotonic(), 0.0
                await receiver.announce(int(line))
                await receiver.wait_for_version(int(line))
                from_relays = relaying.upstream.pulled_bytes
                now = (receiver.received_bytes - from_relays, from_relays)
                took_s = time.monotonic() - start_s
                pulled = f"{now[0] - before[0]} {now[1] - before[1]}"
                say(f"{pulled} {work.done - done} {took_s} {work.longest_wait_s}")
                before = now
            for task in running:
                task.cancel()


if __name__ == "__main__":
    asyncio.run(receive(*sys.argv[1:]))
