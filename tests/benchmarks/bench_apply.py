"""What a weight update costs real vLLM: its pause, the tokens lost to it, and what keeping the KV cache does to them.

Everything is measured in turns with its control, on one engine. Run as `python -m tests.benchmarks.bench_apply`.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import uvloop

from common.canary import canary_prompt
from common.snapshot import CHUNK_BYTES
from rollout_server.inference import Sampling
from rollout_server.nearest_snapshots import TransportName
from rollout_server.vllm_engine import open_vllm_engine
from tests.benchmarks.apply_load import Load, Updates, Window
from tests.benchmarks.apply_versions import MAX_MODEL_LEN, Versions, a_sized_model, engine_settings
from tests.weights.fleet import a_fleet
from tests.weights.model_weights import ModelWeights

SHARES = (0.0, 0.001, 0.01, 0.05)
GATE_COPIES, GOAL_COPIES = 3.0, 1.2  # at 1 %
GATE_EMPTY_MS, GOAL_EMPTY_MS = 50.0, 5.0
GATE_LOST, GOAL_LOST = 0.03, 0.005
JOINING_COPIES, JOINING_S = 5.0, 2.0  # a server that joins may take so many copies, or so long if that is longer


def copy_s(num_bytes: int) -> float:
    """One copy of the model between two warm buffers, in this process."""
    source, target = np.ones(num_bytes, np.uint8), np.ones(num_bytes, np.uint8)
    start_s = time.perf_counter()
    np.copyto(target, source)
    return time.perf_counter() - start_s


async def measure_pauses(size: str, dtype: str, rounds: int, directory: Path) -> None:
    """An engine that has nothing else to do; the pause is from the last step's end to the next one's beginning."""
    model = a_sized_model(size, dtype)
    chains = {share: Versions(directory / f"{share}", model, share) for share in SHARES}
    num_bytes = chains[0.0].num_bytes
    pauses: dict[float | None, list[float]] = {share: [] for share in (*SHARES, None)}
    whole_calls: dict[float, list[float]] = {share: [] for share in SHARES}
    copies: list[float] = []
    async with open_vllm_engine(engine_settings(directory, model)) as engine:
        await engine.load_weights(chains[0.0].whole(0, 0))
        for _ in range(rounds):
            copies.append(copy_s(num_bytes))
            update = await engine.load_weights(chains[0.0].whole(0, engine.loaded_version + 1))
            pauses[None].append(update.pause_s)
            for share, chain in chains.items():
                for old, new in ((0, 1), (1, 0)):
                    start_s = time.perf_counter()
                    update = await engine.load_weights(chain.step(old, new, engine.loaded_version))
                    assert update.in_place
                    pauses[share].append(update.pause_s)
                    whole_calls[share].append(time.perf_counter() - start_s - update.pause_s)
    copy_ms = statistics.median(copies) * 1e3
    print(f"\n{size} {dtype}, {num_bytes / 1e6:.0f} MB, one copy {copy_ms:.1f} ms; medians of {rounds} rounds")
    print("changed      pause ms   copies   before the pause ms")
    for share, found in pauses.items():
        pause_ms = statistics.median(found) * 1e3
        before = "" if share is None else f"{statistics.median(whole_calls[share]) * 1e3:10.1f}"
        title = "all copied" if share is None else f"{share:10.1%}"
        print(f"{title:10} {pause_ms:10.2f} {pause_ms / copy_ms:8.2f} {before}", flush=True)


async def measure_lost_tokens(size: str, rounds: int, load: Load, intervals: Sequence[int], directory: Path) -> None:
    """The same work with and without updates, in turns: wall time and the engine's processor time per token."""
    model = a_sized_model(size, "float32")
    chain = Versions(directory / "versions", model, 0.01)
    windows: dict[str, list[Window]] = {}
    async with open_vllm_engine(engine_settings(directory, model)) as engine:
        updates = Updates(engine, chain)
        await updates.begin()
        await load.run(engine, updates, steps_per_update=None, turn=-1)
        ways = [("no updates", False, None)]
        for every in intervals:
            ways += [(f"cleared, every {every}", True, every), (f"kept, every {every}", False, every)]
        for turn in range(rounds):
            for name, clear_cache, every in ways[turn % len(ways) :] + ways[: turn % len(ways)]:
                engine.clear_cache = clear_cache
                window = await load.run(engine, updates, steps_per_update=every, turn=turn)
                windows.setdefault(name, []).append(window)
    print(f"\n{size} float32, 1 % changed, {load}; medians of {rounds} rounds, over no updates in the same round")
    print("KV cache, steps per update  tokens/s   lost: wall  engine's CPU   updates  share of time paused", end="")
    print("  ms per update: pause  engine's CPU  server's CPU")
    for name, found in windows.items():
        pairs = list(zip(found, windows["no updates"], strict=True))
        wall = statistics.median(1 - mine.tokens_per_s / control.tokens_per_s for mine, control in pairs)
        cpu = statistics.median(1 - control.cpu_s_per_token / mine.cpu_s_per_token for mine, control in pairs)
        rate = statistics.median(window.tokens_per_s for window in found)
        pause_ms = statistics.median([pause for window in found for pause in window.pauses_s] or [0.0]) * 1e3
        paused = sum(sum(window.pauses_s) for window in found) / sum(window.wall_s for window in found)
        num_updates = sum(len(window.pauses_s) for window in found)
        print(f"{name:26} {rate:9.0f} {wall:11.1%} {cpu:13.1%} {num_updates:9} {paused:21.2%}", end="")
        if num_updates:
            costs = [mine.cpu_s_per_update(control) for mine, control in pairs]
            engine_ms, server_ms = (statistics.median(each) * 1e3 for each in zip(*costs, strict=True))
            print(f" {pause_ms:21.2f} {engine_ms:13.1f} {server_ms:13.1f}", end="")
        print(flush=True)


async def measure_errors(size: str, share: float, load: Load, directory: Path) -> None:
    """What is recorded against a transformers forward of the version that each token's span names."""
    model = a_sized_model(size, "float32")
    num_sets = load.new_tokens // 20 + 2
    chain = Versions(directory / "versions", model, share, num_sets=num_sets)
    async with open_vllm_engine(engine_settings(directory, model)) as engine:
        for name, clear_cache in (("cleared", True), ("kept", False)):
            engine.clear_cache = clear_cache
            updates = Updates(engine, chain)
            await updates.begin()
            window = await load.run(engine, updates, steps_per_update=20, turn=0)
            errors = np.concatenate([updates.errors(*one) for one in window.done])
            of_gap = np.concatenate([updates.errors(*one, versions_behind=1) for one in window.done])
            print(f"{share:7.1%} {name:8} {errors.mean():10.1e} {errors.max():10.1e} {of_gap.mean():16.1e}", flush=True)


async def measure_joining(size: str, rounds: int, directory: Path) -> None:
    """From an engine that is up, without weights or with old ones, to its first token under the newest ones."""
    model = a_sized_model(size, "float32")
    prompt = canary_prompt(model.config.vocab_size, MAX_MODEL_LEN)
    assert prompt is not None
    weights = ModelWeights(model, prompt)
    num_bytes = sum(tensor.nbytes for _, tensor in weights.tensors)
    transports: tuple[TransportName, ...] = ("zeromq", "shared_memory")
    took_s: dict[str, list[float]] = {transport: [] for transport in transports}
    copies: list[float] = []
    async with (
        open_vllm_engine(engine_settings(directory, model)) as engine,
        a_fleet(directory, num_members=0, patience_s=600, weights=weights, chunk_bytes=CHUNK_BYTES) as fleet,
    ):
        for _ in range(rounds):
            for transport in transports:
                fleet.stop_following()
                await fleet.publish(None)
                copies.append(copy_s(num_bytes))
                start_s = time.perf_counter()
                member = await fleet.join(transport, engine, is_direct=True)
                await member.receiver.announce(fleet.version)
                await member.receiver.wait_for_version(fleet.version)
                await engine.generate(prompt[:8], Sampling(temperature=1.0, max_new_tokens=1, seed=0), "first")
                took_s[transport].append(time.perf_counter() - start_s)
    copy_ms = statistics.median(copies) * 1e3
    gate_s = max(JOINING_S, JOINING_COPIES * copy_ms / 1e3)
    print(
        f"\n{size} float32, {num_bytes / 1e6:.0f} MB, one copy {copy_ms:.1f} ms: from engine up to first token, "
        f"gate {gate_s:.1f} s; load {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores"
    )
    for transport, found in took_s.items():
        verdict = "met" if statistics.median(found) <= gate_s else "MISSED"
        print(f"{transport:14} median {statistics.median(found):.2f} s, most {max(found):.2f} s: {verdict}", flush=True)


async def in_a_directory(measure: Callable[[Path], Awaitable[None]]) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        await measure(Path(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=["pauses", "lost", "errors", "joining"])
    parser.add_argument("--requests", type=int, default=16, help="at once, where lost tokens are measured")
    parser.add_argument("--new-tokens", type=int, default=220, help="of each request; as many steps")
    parser.add_argument("--steps-per-update", type=int, nargs="+", default=[20, 200])
    options = parser.parse_args()

    def wanted(part: str) -> bool:
        return options.only in (None, part)

    async def run() -> None:
        if wanted("pauses"):
            for size, dtype in (("30M", "float32"), ("100M", "bfloat16")):
                await in_a_directory(lambda to, size=size, dtype=dtype: measure_pauses(size, dtype, options.rounds, to))
        if wanted("lost"):
            load = Load(requests=options.requests, prompt_tokens=32, new_tokens=options.new_tokens)
            await in_a_directory(
                lambda to: measure_lost_tokens("30M", options.rounds, load, options.steps_per_update, to)
            )
        if wanted("errors"):
            print("\nchanged KV cache  error: mean   largest    one version off")
            load = Load(requests=4, prompt_tokens=32, new_tokens=options.new_tokens)
            for share in (0.01, 0.075):
                await in_a_directory(lambda to, share=share: measure_errors("5M", share, load, to))
        if wanted("joining"):
            await in_a_directory(lambda to: measure_joining("30M", options.rounds, to))

    uvloop.run(run())  # as servers do


if __name__ == "__main__":
    main()
