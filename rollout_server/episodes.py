"""Episodes: from a lease to a group of trajectories, token-in and token-out."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping

import numpy as np

from common.environments import ENVIRONMENT_UNAVAILABLE, EnvironmentSettings
from common.messages import Lease
from common.snapshot import NO_VERSION
from common.trajectory import FinishReason, Group, Trajectory
from rollout_server.conversation import Conversation
from rollout_server.environments.environment import (
    MAX_REASON_CHARS,
    BadRow,
    Environment,
    EnvironmentFailure,
    Episode,
    Observation,
    Row,
    check_reward,
    parse_row,
)
from rollout_server.inference import Completion, EngineError, InferenceEngine, Sampling
from rollout_server.prompts import prompt_ids
from rollout_server.tokenizer import Tokenizer
from rollout_server.turns import Bounds, PromptTooLong, Turns, fitted_prompt

MIN_REPLY_TOKENS = 16  # what the environment says is cut to leave room for so many
_MASK_64 = (1 << 64) - 1


class LeaseFailure(Exception):
    """A lease cannot be fulfilled. `kind` is one of FAILURE_KINDS, `reason` is for people."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(f"{kind}: {reason}")
        self.kind = kind
        self.reason = reason[:MAX_REASON_CHARS]


FAILURE_KINDS = {
    "bad_row": "the dataset row has no usable prompt",
    "prompt_too_long": "the prompt leaves no room for a single token",
    "group_too_large": "the group has more bytes than the lease pays for",
    "wrong_environment": "the lease is of another environment than this server runs",
    "environment_error": "the environment raised or died",
    "environment_timeout": "the environment, or the whole episode, took too long",
    ENVIRONMENT_UNAVAILABLE: "the environment could not be reached",
    "masked": "the environment said that the episode must not be trained on",
    "bad_reward": "the environment gave something that is not a plausible number",
    "engine_error": "the engine died or refused the request",
    "bad_sample": "the engine's tokens cannot be trained on: no tokens, no finite log-probability, too old",
}


def sample_seed(seed: int, index: int) -> int:
    """The seed of sample `index` of a task with `seed`, in [0, 2**63).

    It is the upper 63 bits of output number `index` of SplitMix64 started at `seed` (Steele, Lea and Flood 2014), so
    that samples are independent and anybody can say which seed a server must have used.
    """
    mixed = (seed + (index + 1) * 0x9E3779B97F4A7C15) & _MASK_64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return (mixed ^ (mixed >> 31)) >> 1


class EpisodeRunner:
    """Runs leases on one engine and tokenizer. Any number of `run` calls may be under way at once."""

    def __init__(
        self,
        engine: InferenceEngine,
        environments: Mapping[str, Environment],  # by the names that leases give them
        tokenizer: Tokenizer,
        *,
        temperature: float,
        max_new_tokens: int,  # per turn
        max_model_len: int,
        wait_for_version: Callable[[int], Awaitable[None]],  # returns once engine.loaded_version is at least that
    ) -> None:
        self._engine = engine
        self._environments = environments
        self._tokenizer = tokenizer
        self._temperature = temperature
        self._max_new_tokens = max_new_tokens
        self._max_model_len = min(max_model_len, engine.max_model_len)
        self._wait_for_version = wait_for_version
        self.num_running = 0
        self.num_sampled_tokens = 0  # since the start, also of groups that failed

    def __repr__(self) -> str:
        progress = f"{self.num_running} groups running, {self.num_sampled_tokens} tokens sampled"
        return f"<EpisodeRunner {', '.join(self._environments)}, {progress}>"

    async def run(self, lease: Lease) -> Group:
        """The group of the lease; raises LeaseFailure. If one sample fails, the others are cancelled."""
        if lease.environment not in self._environments:
            known = ", ".join(self._environments)
            raise LeaseFailure("wrong_environment", f"{lease.environment}; this server runs {known}")
        self.num_running += 1
        try:
            row = _parsed(lease.row)
            await self._wait_for_version(max(lease.min_version, NO_VERSION + 1))
            group = await self._run_group(row, lease)
        finally:
            self.num_running -= 1
        if group.num_bytes > lease.max_group_bytes:
            raise LeaseFailure("group_too_large", f"{group.num_bytes} bytes, the lease pays {lease.max_group_bytes}")
        return group

    async def _run_group(self, row: Row, lease: Lease) -> Group:
        prompts = _PromptMemo(self._tokenizer)
        try:
            async with asyncio.TaskGroup() as samples:
                episodes = [
                    samples.create_task(self._run_sample(row, lease, index, prompts))
                    for index in range(lease.group_size)
                ]
        except ExceptionGroup as failures:
            first = failures.exceptions[0]
            if all(isinstance(error, LeaseFailure) for error in failures.exceptions):
                raise first from first.__cause__
            raise  # a bug, not a failure of the lease
        trajectories = tuple(trajectory for episode in episodes for trajectory in episode.result())
        return Group(lease_id=lease.lease_id, task_id=lease.task_id, trajectories=trajectories)

    async def _run_sample(self, row: Row, lease: Lease, index: int, prompts: "_PromptMemo") -> list[Trajectory]:
        environment = self._environments[lease.environment]
        timeout_s = environment.settings.episode_timeout_s
        try:
            async with asyncio.timeout(timeout_s), environment.episode(row, seed=lease.seed) as episode:
                first = await episode.reset()
                bounds = self._bounds(environment.settings)
                if first != row.prompt:  # a prompt of the dataset is never cut
                    first = fitted_prompt(first, self._tokenizer, bounds)
                turns = Turns(Conversation(first, self._tokenizer), prompts.ids(first), bounds)
                return await self._run_turns(turns, episode, lease, index)
        except TimeoutError as error:
            raise LeaseFailure("environment_timeout", f"the episode was not done within {timeout_s:g} s") from error
        except EnvironmentFailure as failure:
            raise LeaseFailure(failure.kind, failure.reason) from failure
        except BadRow as error:
            raise LeaseFailure("bad_row", str(error)) from error
        except PromptTooLong as error:
            raise LeaseFailure("prompt_too_long", str(error)) from error
        except EngineError as error:
            raise LeaseFailure("engine_error", str(error)) from error

    def _bounds(self, settings: EnvironmentSettings) -> Bounds:
        return Bounds(
            max_model_len=self._max_model_len,
            reply_room=min(self._max_new_tokens, MIN_REPLY_TOKENS),
            max_observation_tokens=settings.max_observation_tokens,
            max_turns=settings.max_turns,
        )

    async def _run_turns(self, turns: Turns, episode: Episode, lease: Lease, index: int) -> list[Trajectory]:
        total_reward = 0.0
        while True:
            completion = await self._sample_turn(turns, lease, index)
            said = turns.say(completion, self._tokenizer)
            step = await episode.step(said)
            total_reward = check_reward(total_reward + check_reward(step.reward))
            if step.done:
                is_cut = step.truncated or not completion.terminated
                return turns.trajectories(total_reward, FinishReason.TRUNCATED if is_cut else FinishReason.TERMINATED)
            if not completion.terminated or not turns.go_on(said, step.observation):
                if step.end is not None:
                    total_reward = check_reward(total_reward + check_reward(await step.end()))
                return turns.trajectories(total_reward, FinishReason.TRUNCATED)

    async def _sample_turn(self, turns: Turns, lease: Lease, index: int) -> Completion:
        log, turn = turns.log, turns.num_taken
        room = self._max_model_len - len(log)
        if room < 1:
            raise LeaseFailure("prompt_too_long", f"{len(log)} tokens; the model takes {self._max_model_len} in all")
        seed = sample_seed(lease.seed, index)
        sampling = Sampling(
            temperature=self._temperature,
            max_new_tokens=min(self._max_new_tokens, room),
            seed=sample_seed(seed, turn) if turn else seed,
        )
        try:
            completion = await self._engine.generate(log.token_ids, sampling, f"{lease.lease_id}.{index}.{turn}")
        except ValueError as error:
            raise LeaseFailure("engine_error", f"the engine refused the prompt: {error}") from error
        self.num_sampled_tokens += completion.token_ids.size
        _check_sample(completion, lease.min_version)
        return completion


def _parsed(row_json: bytes) -> Row:
    try:
        return parse_row(row_json)
    except BadRow as error:
        raise LeaseFailure("bad_row", str(error)) from error


class _PromptMemo:
    """Tokenizes once what the samples of a group all read first."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._last: tuple[Observation, np.ndarray] | None = None

    def ids(self, observation: Observation) -> np.ndarray:
        if self._last is None or self._last[0] != observation:
            self._last = (observation, prompt_ids(observation, self._tokenizer))
        return self._last[1]


def _check_sample(completion: Completion, min_version: int) -> None:
    """Raises LeaseFailure for tokens that would poison a gradient."""
    num_tokens = completion.token_ids.size
    if num_tokens == 0:
        raise LeaseFailure("bad_sample", "the engine sampled no token")
    if not num_tokens == completion.logprobs.size == completion.token_versions.size:
        sizes = f"{num_tokens} tokens, {completion.logprobs.size} log-probs, {completion.token_versions.size} versions"
        raise LeaseFailure("bad_sample", f"the engine's evidence does not match its tokens: {sizes}")
    if not np.isfinite(completion.logprobs).all():
        raise LeaseFailure("bad_sample", "a sampled token has a log-probability that is not finite")
    oldest = int(completion.token_versions.min())
    if oldest < max(min_version, NO_VERSION + 1):
        raise LeaseFailure("bad_sample", f"a token of version {oldest}, the lease wants at least {min_version}")
