"""The decoders, each with valid bytes to damage, the error it may raise, and what must hold for all that it accepts."""

import random
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np

from common.canary import Canary
from common.codec import LOGPROB_SLACK, Decoder, ProtocolError, encode, pack_group, unpack_groups
from common.delta import (
    blocks_of,
    build_delta_manifest,
    decode_delta_manifest,
    encode_delta,
    encode_delta_manifest,
)
from common.key_files import KeyFileError, decode_keys
from common.messages import GroupHeader, GroupsFinished
from common.snapshot import (
    SnapshotError,
    SnapshotManifest,
    TensorSpec,
    build_manifest,
    decode_manifest,
    encode_manifest,
)
from common.together import join_payloads
from learner.coordinator.admission import Admission
from learner.coordinator.ledger import FrontierError, FrontierState, OpenTask, PastLeases, decode_frontier
from learner.coordinator.replay_queue import FinishedGroup
from rollout_server.environments.frames import Call, FrameBuffer, FrameError, Outcome, pack
from rollout_server.environments.worker_process import REPLY_SLACK_BYTES
from tests.builders_codec import UNIONS, a_group, a_trajectory, examples_of
from tests.fuzz.adapters import Adapters
from tests.fuzz.damages import OF_BYTES, OF_MESSAGES, damaged

MAX_WORDS_CHARS = 1_000
MAX_PAYLOAD_BYTES = 1 << 20
RUN = Admission(group_size=2, vocab_size=100, max_model_len=8)
NEWEST_VERSION = 4


class Target(Protocol):
    """One decoder."""

    name: str

    def refuses(self, rng: random.Random) -> bool:
        """Damage one example and decode it. Raises AssertionError when what is accepted breaks a promise."""
        ...


def check_words(error: ProtocolError) -> bool:
    """They end in a log and in front of people; True."""
    words = str(error)
    assert words.isprintable(), f"control characters in {words!r}"
    assert len(words) < MAX_WORDS_CHARS, f"an error of {len(words)} characters"
    return True


class Messages:
    """All messages of one direction."""

    def __init__(self, name: str) -> None:
        self.name = name
        union = UNIONS[name]
        examples = examples_of(union)
        self._headers = [bytes(encode(example)[0]) for example in examples]
        self._kinds = tuple(type(example) for example in examples)
        self._decoder = Decoder(union, max_payload_bytes=MAX_PAYLOAD_BYTES)

    def refuses(self, rng: random.Random) -> bool:
        header = rng.choice(self._headers)
        frames = [header, b""]
        if rng.random() < 0.02:
            frames = rng.choice(
                ([], [header], [header, b"", b""], [b"", header], [header, b"x" * (MAX_PAYLOAD_BYTES + 1)])
            )
        else:
            try:
                frames[0] = damaged(header, OF_MESSAGES, rng)
            except (msgspec.DecodeError, AssertionError, ValueError, IndexError, RecursionError):
                frames[0] = header[:-1]  # an earlier damage has left no tree to change
        try:
            message, _ = self._decoder.decode(frames)
        except ProtocolError as error:
            return check_words(error)
        assert isinstance(message, self._kinds)
        assert len(frames[1]) <= MAX_PAYLOAD_BYTES
        assert self._decoder.decode(encode(message)) == (message, b"")
        return False


class Groups:
    """Headers and payload of groups, as a server sends them, through admission, and as the learner reads them."""

    name = "groups"

    def __init__(self) -> None:
        short, long = a_trajectory(), a_trajectory(loss_mask=(False,) + 4 * (True,), versions=(3, 3, 4, 4))
        too_long = a_trajectory(loss_mask=9 * (True,), versions=9 * (4,))
        groups = [(short, long), (long, short), (short, too_long), (short, long, short), (short,)]
        halves = [pack_group(a_group(*trajectories)) for trajectories in groups]
        self._messages = [_finished(*some) for some in (*((half,) for half in halves), halves[:2], halves)]
        self._decoder = Decoder(GroupsFinished, max_payload_bytes=MAX_PAYLOAD_BYTES)

    def refuses(self, rng: random.Random) -> bool:
        frames = list(rng.choice(self._messages))
        which = rng.randrange(2)
        frames[which] = damaged(frames[which], OF_BYTES, rng)
        try:
            message, body = self._decoder.decode(frames)
            assert isinstance(message, GroupsFinished)
            judged = RUN.judge(message.groups, body, newest_version=NEWEST_VERSION)
        except ProtocolError as error:
            return check_words(error)
        assert len(judged) == len(message.groups)
        for header, one in zip(message.groups, judged, strict=True):
            if isinstance(one, ProtocolError):
                check_words(one)
            else:
                assert one.header == header
                self._check(one)
        return any(isinstance(one, ProtocolError) for one in judged)

    def _check(self, admitted: FinishedGroup) -> None:
        """Whatever was taken is plausible, and the learner can read it."""
        body = admitted.payload
        [group] = unpack_groups([admitted.header], body)
        num_tokens = sum(map(len, group.trajectories))
        assert np.frombuffer(body, "<f4", num_tokens, 4 * num_tokens).max() <= LOGPROB_SLACK
        assert np.frombuffer(body, np.uint8, num_tokens, 8 * num_tokens).max() <= 1
        assert 0 <= admitted.oldest_version <= admitted.newest_version <= NEWEST_VERSION
        assert len(group.trajectories) == RUN.group_size
        for trajectory in group.trajectories:
            mask, logprobs = trajectory.loss_mask, trajectory.behavior_logprobs
            assert trajectory.token_ids.min() >= 0
            assert trajectory.token_ids.max() < RUN.vocab_size
            assert len(trajectory) <= RUN.max_model_len
            assert np.isfinite(logprobs).all()
            assert logprobs.max() <= 0
            assert not logprobs[~mask].any()
            assert ((trajectory.token_versions >= 0) == mask).all()
            assert trajectory.num_sampled_tokens > 0
            assert np.isfinite(trajectory.reward)


def _finished(*halves: tuple[GroupHeader, bytes]) -> tuple[bytes, bytes]:
    headers = tuple(header for header, _ in halves)
    payload = bytes(join_payloads(headers, [payload for _, payload in halves]))
    return bytes(encode(GroupsFinished(groups=headers))[0]), payload


def a_manifest(version: int) -> tuple[SnapshotManifest, bytes]:
    """With a canary; each version differs from the one before in some elements."""
    data = bytearray(bytes(range(256)) * 12)
    data[:: 512 // version] = bytes([version]) * len(data[:: 512 // version])
    layout = tuple(
        TensorSpec(name=f"layer.{number}", shape=(16, 12), dtype="float32", offset=number * 768) for number in range(4)
    )
    canary = Canary(token_ids=(7, 3, 9), logprobs=(-1.5, -0.25), tolerance=0.1)
    manifest = build_manifest(memoryview(data), layout, run_id="run", version=version, chunk_bytes=1000, canary=canary)
    return manifest, bytes(data)


class Manifests:
    """Of snapshots: whatever is not bit for bit the publisher's is refused."""

    name = "manifests"

    def __init__(self) -> None:
        self._encoded = encode_manifest(a_manifest(3)[0])

    def refuses(self, rng: random.Random) -> bool:
        data = damaged(self._encoded, OF_BYTES, rng)
        try:
            manifest = decode_manifest(data)
        except SnapshotError:
            return True
        assert encode_manifest(manifest) == self._encoded, "a changed manifest was accepted"
        return False


class DeltaManifests:
    """Likewise, of what leads from one version to the next."""

    name = "delta manifests"

    def __init__(self) -> None:
        (base, old), (target, new) = a_manifest(2), a_manifest(3)
        blocks = encode_delta(old, new, blocks_of(target.tensors))
        assert blocks is not None
        self._encoded = encode_delta_manifest(build_delta_manifest(base, target, blocks)[0])

    def refuses(self, rng: random.Random) -> bool:
        data = damaged(self._encoded, OF_BYTES, rng)
        try:
            manifest = decode_delta_manifest(data)
        except SnapshotError:
            return True
        assert encode_delta_manifest(manifest) == self._encoded, "a changed manifest was accepted"
        return False


class Frontiers:
    """Of checkpoints."""

    name = "frontiers"

    def __init__(self) -> None:
        tasks = (OpenTask(4), OpenTask(7, losses=1))
        state = FrontierState(
            version=3, source="data", next_task_id=9, open_tasks=tasks, parked={5: "it failed"}, past=PastLeases()
        )  # fmt: skip
        self._encoded = msgspec.json.encode(state)

    def refuses(self, rng: random.Random) -> bool:
        try:
            state = decode_frontier(damaged(self._encoded, OF_BYTES, rng), version=3, source="data")
        except FrontierError:
            return True
        assert state.version <= 3
        return False


class WorkerFrames:
    """The byte stream from a reward worker, in pieces of any size."""

    name = "worker frames"

    def __init__(self) -> None:
        outcomes = (
            Outcome(1, 0.5),
            Outcome(2, None, "environment_error", "it failed"),
            Outcome(3, 0.0, observation=[{"role": "user", "content": "hi"}], done=False),
        )
        calls = [Call(1, "prompt", "completion", msgspec.Raw(b'{"a":1}'))]
        self._stream = b"".join((*map(pack, outcomes), pack(calls)))
        self._decode = msgspec.json.Decoder(Outcome).decode

    def refuses(self, rng: random.Random) -> bool:
        stream = damaged(self._stream, OF_BYTES, rng)
        if rng.random() < 0.05:
            # Frames of no bytes, unless a length that was damaged waits for them.
            stream += bytes(2 * REPLY_SLACK_BYTES)
        frames = FrameBuffer(REPLY_SLACK_BYTES)
        try:
            while stream:
                size = rng.choice((1, 7, 64, 1 << 16))
                piece, stream = stream[:size], stream[size:]
                for body in frames.feed(piece):
                    outcome = self._decode(body)
                    assert outcome.reward is None or np.isfinite(outcome.reward)
                assert len(frames._data) <= REPLY_SLACK_BYTES + 4
        except (FrameError, msgspec.MsgspecError, UnicodeDecodeError):
            return True
        return False


class KeyFiles:
    """What an operator, or a bad disk, may leave in one."""

    name = "key files"

    def __init__(self) -> None:
        self._content = b"".join(b'%s = "%s"\n' % (name, b"0f" * 32) for name in (b"public", b"secret"))

    def refuses(self, rng: random.Random) -> bool:
        try:
            keys = decode_keys(Path("a.key"), damaged(self._content, OF_BYTES, rng), ("public", "secret"))
        except KeyFileError:
            return True
        assert [len(key) for key in keys.values()] == [32, 32]
        return False


def all_targets() -> list[Target]:
    return [
        *map(Messages, UNIONS), Groups(), Manifests(), DeltaManifests(), Adapters(), Frontiers(), WorkerFrames(),
        KeyFiles(),
    ]  # fmt: skip
