"""Episodes: from a lease to a group of trajectories, token-in and token-out."""

import asyncio
import copy
import itertools
from collections.abc import Awaitable, Callable, Mapping

import numpy as np

from common.environments import EnvironmentSettings
from common.messages import Evaluate, Lease
from common.snapshot import NO_VERSION
from common.trajectory import FinishReason, Group, Trajectory
from rollout_server.conversation import Conversation
from rollout_server.environments.environment import (
    AgentEnvironment,
    BadRow,
    Environment,
    EnvironmentFailure,
    Episode,
    Observation,
    Row,
    check_reward,
    parse_row,
)
from rollout_server.gateway.gateway import Gateway
from rollout_server.inference import Completion, EngineError, InferenceEngine, Sampling
from rollout_server.lease_failure import LeaseFailure, check_sample
from rollout_server.prompts import prompt_ids
from rollout_server.tokenizer import Tokenizer
from rollout_server.turns import Bounds, PromptTooLong, Turns, fitted_prompt

MIN_REPLY_TOKENS = 16  # what the environment says is cut to leave room for so many
EVALUATION_BYTES = 1 << 40  # of a group that never leaves this process: no bound
_MASK_64 = (1 << 64) - 1


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
        environments: Mapping[str, Environment | AgentEnvironment],  # by the names that leases give them
        tokenizer: Tokenizer,
        *,
        temperature: float,
        max_new_tokens: int,  # per turn
        max_model_len: int,
        wait_for_version: Callable[[int], Awaitable[None]],  # returns once engine.loaded_version is at least that
        gateway: Gateway | None = None,  # for environments whose agents call it
    ) -> None:
        self._engine = engine
        self._environments = environments
        self.tokenizer = tokenizer
        self._temperature = temperature
        self.max_new_tokens = max_new_tokens
        self.max_model_len = min(max_model_len, engine.max_model_len)
        self.vocab_size = engine.vocab_size
        self._wait_for_version = wait_for_version
        self._gateway = gateway
        self._request_prefix = ""  # request ids are unique in the engine
        self._evaluation_numbers = itertools.count()
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

    async def run_evaluation(self, evaluate: Evaluate) -> Group:
        """The episodes of an evaluation task, sampled at its own temperature; raises LeaseFailure.

        A runner of their own counts them: they are no tokens that training has sampled.
        """
        runner = copy.copy(self)
        runner._temperature, runner._request_prefix = (
            evaluate.temperature,
            f"evaluation {next(self._evaluation_numbers)} ",
        )
        lease = Lease(
            lease_id=evaluate.evaluation_id,
            task_id=evaluate.task_id,
            environment=evaluate.environment,
            row=evaluate.row,
            group_size=evaluate.samples,
            seed=evaluate.seed,
            min_version=evaluate.version,
            max_group_bytes=EVALUATION_BYTES,
        )
        return await runner.run(lease)

    async def _run_group(self, row: Row, lease: Lease) -> Group:
        prompts = _PromptMemo(self.tokenizer)
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
            async with asyncio.timeout(timeout_s):
                if isinstance(environment, AgentEnvironment):
                    return await self._run_agent(environment, row, lease, index)
                return await self._run_episode(environment, row, lease, index, prompts)
        except TimeoutError as error:
            raise LeaseFailure("environment_timeout", f"the episode was not done within {timeout_s:g} s") from error
        except EnvironmentFailure as failure:
            raise LeaseFailure(failure.kind, failure.reason) from failure
        except BadRow as error:
            raise LeaseFailure("bad_row", str(error)) from error
        except PromptTooLong as error:
            raise LeaseFailure("prompt_too_long", str(error)) from error

    async def _run_episode(
        self, environment: Environment, row: Row, lease: Lease, index: int, prompts: "_PromptMemo"
    ) -> list[Trajectory]:
        async with environment.episode(row, seed=lease.seed) as episode:
            first = await episode.reset()
            bounds = self._bounds(environment.settings)
            if first != row.prompt:  # a prompt of the dataset is never cut
                first = fitted_prompt(first, self.tokenizer, bounds)
            turns = Turns(Conversation(first, self.tokenizer), prompts.ids(first), bounds)
            return await self._run_turns(turns, episode, lease, index)

    async def _run_agent(self, environment: AgentEnvironment, row: Row, lease: Lease, index: int) -> list[Trajectory]:
        assert self._gateway is not None, "a server with such environments has a gateway"
        policy = _LeasePolicy(self, lease, index)
        async with self._gateway.session(policy, max_calls=environment.settings.max_turns) as session:
            outcome = await environment.play(row, session, seed=lease.seed)
        return session.trajectories(outcome)

    def _bounds(self, settings: EnvironmentSettings) -> Bounds:
        return Bounds(
            max_model_len=self.max_model_len,
            reply_room=min(self.max_new_tokens, MIN_REPLY_TOKENS),
            max_observation_tokens=settings.max_observation_tokens,
            max_turns=settings.max_turns,
        )

    async def _run_turns(self, turns: Turns, episode: Episode, lease: Lease, index: int) -> list[Trajectory]:
        total_reward = 0.0
        while True:
            completion = await self._sample_turn(turns, lease, index)
            said = turns.say(completion, self.tokenizer)
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
        return await self.sample(turns.log.token_ids, lease, index, turns.num_taken, self.max_new_tokens)

    async def sample(
        self, prompt_ids_T: np.ndarray, lease: Lease, index: int, turn: int, max_new_tokens: int
    ) -> Completion:
        """What the policy says in turn `turn` of sample `index` of the lease; raises LeaseFailure."""
        room = self.max_model_len - prompt_ids_T.size
        if room < 1:
            raise LeaseFailure(
                "prompt_too_long", f"{prompt_ids_T.size} tokens; the model takes {self.max_model_len} in all"
            )
        seed = sample_seed(lease.seed, index)
        sampling = Sampling(
            temperature=self._temperature,
            max_new_tokens=min(max_new_tokens, room),
            seed=sample_seed(seed, turn) if turn else seed,
        )
        try:
            request_id = f"{self._request_prefix}{lease.lease_id}.{index}.{turn}"
            completion = await self._engine.generate(prompt_ids_T, sampling, request_id)
        except ValueError as error:
            raise LeaseFailure("engine_error", f"the engine refused the prompt: {error}") from error
        except EngineError as error:
            raise LeaseFailure("engine_error", str(error)) from error
        self.num_sampled_tokens += completion.token_ids.size
        check_sample(completion, lease.min_version)
        return completion


class _LeasePolicy:
    """gateway.session.Policy for one sample of a lease."""

    def __init__(self, runner: EpisodeRunner, lease: Lease, index: int) -> None:
        self.tokenizer = runner.tokenizer
        self.vocab_size = runner.vocab_size
        self.max_model_len = runner.max_model_len
        self.max_new_tokens = runner.max_new_tokens
        self._runner = runner
        self._lease = lease
        self._index = index

    async def sample(self, prompt_ids_T: np.ndarray, *, max_new_tokens: int, call: int) -> Completion:
        return await self._runner.sample(prompt_ids_T, self._lease, self._index, call, max_new_tokens)


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
