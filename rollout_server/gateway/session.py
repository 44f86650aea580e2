"""Session: one episode that an agent drives: its key, its calls, what they sampled, and its reward."""

import asyncio
import itertools
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Protocol

import numpy as np

from common.trajectory import FinishReason, Trajectory
from rollout_server.environments.environment import EnvironmentFailure, Outcome, Row, check_reward
from rollout_server.environments.scopes import Scopes
from rollout_server.gateway.api_error import ApiError
from rollout_server.gateway.chats import Chats, too_long_error
from rollout_server.gateway.offers import Offers
from rollout_server.gateway.recorder import Recorder
from rollout_server.gateway.response_store import ResponseStore
from rollout_server.gateway.tools import ToolParser
from rollout_server.inference import Completion
from rollout_server.lease_failure import LeaseFailure
from rollout_server.tokenizer import Tokenizer

MAX_PARALLEL_CALLS = 64


class Policy(Protocol):
    """What a session samples with, under the lease of its episode."""

    tokenizer: Tokenizer
    vocab_size: int
    max_model_len: int
    max_new_tokens: int  # of one call

    async def sample(self, prompt_ids_T: np.ndarray, *, max_new_tokens: int, call: int) -> Completion:
        """call: the how many-th of its session, from 0, for the seed. Raises LeaseFailure."""
        ...


class Session:
    """Opened by Gateway.session for one episode; what its agent calls afterwards is refused.

    An environment hands `base_url` and `api_key` to an agent, or `url` alone, and waits for it.
    """

    def __init__(
        self, policy: Policy, parser: ToolParser, offers: Offers, *, address: str, model: str, max_calls: int
    ) -> None:
        self.policy = policy
        self.api_key = f"sk-{secrets.token_hex(24)}"
        self.base_url = f"{address}/v1"  # for OPENAI_BASE_URL, with api_key for OPENAI_API_KEY
        self.url = f"{address}/session/{self.api_key}/v1"  # likewise, and says itself which session it is
        self.id = secrets.token_hex(8)  # for logs: it opens nothing
        self.model = model
        self.chats = Chats(policy.tokenizer, parser, policy.max_model_len)
        self.offers = offers
        self.responses = ResponseStore()
        self.is_cut = False  # a limit kept the agent, or the policy in its last call, from going on
        self.reward: float | None = None
        self._bad_reward: EnvironmentFailure | None = None
        self._recorder = Recorder()
        self._max_calls = max_calls
        self._numbers = itertools.count()
        self._num_begun = 0
        self._num_running = 0
        self._active_at = time.monotonic()
        self._calls = Scopes()
        self._ended = asyncio.Event()
        self._lease_failure: LeaseFailure | None = None
        self._scope: asyncio.Timeout | None = None

    def __repr__(self) -> str:
        return f"<Session {self.id}, {self._num_running} calls running, {self._recorder!r}, reward {self.reward}>"

    @property
    def num_calls(self) -> int:
        """Answered ones."""
        return self._recorder.num_calls

    @property
    def has_begun(self) -> bool:
        """The agent has asked for an answer, be it in vain."""
        return self._num_begun > 0

    @property
    def idle_s(self) -> float:
        """Since the agent was last heard of; 0 while a call of it runs."""
        return 0.0 if self._num_running else time.monotonic() - self._active_at

    def note_activity(self) -> None:
        """The agent is alive."""
        self._active_at = time.monotonic()

    # --- for environments --------------------------------------------------------------------------------------------

    def invitation(self, row: Row, *, seed: int, timeout_s: float) -> dict[str, Any]:
        """What an agent must know to play the row, as JSON values."""
        return {
            "session_id": self.id,
            "base_url": self.base_url,
            "api_key": self.api_key,
            "session_url": self.url,
            "model": self.model,
            "task": dict(row.fields),
            "seed": seed,
            "timeout_s": timeout_s,
        }

    async def ended(self) -> None:
        """Returns when the agent has said that nothing follows."""
        await self._ended.wait()

    def outcome(self) -> Outcome:
        """Of the reward that the agent has set; raises EnvironmentFailure when there is none."""
        if self.reward is None:
            raise self._bad_reward or EnvironmentFailure("bad_reward", "the agent ended without a reward")
        return Outcome(reward=self.reward)

    # --- for the agent's requests ------------------------------------------------------------------------------------

    @asynccontextmanager
    async def call(self) -> AsyncIterator[None]:
        """One request for completions; raises ApiError when there can be none, also when the session ends meanwhile."""
        self._admit()
        self._num_begun += 1
        self._num_running += 1
        try:
            async with self._calls.open():
                yield
        except EnvironmentFailure as failure:
            raise ended_error() from failure
        except asyncio.CancelledError:
            self._num_begun -= 1  # the agent hung up: it may ask again
            raise
        finally:
            self._num_running -= 1
            self.note_activity()

    def _admit(self) -> None:
        if self._ended.is_set():
            raise ended_error()
        if self._num_running >= MAX_PARALLEL_CALLS:
            raise ApiError(429, "too_many_calls", f"this session has {MAX_PARALLEL_CALLS} calls running already")
        if self._num_begun >= self._max_calls:
            self.is_cut = True
            raise ApiError(
                403, "max_turns", f"an episode has at most {self._max_calls} calls (max_turns): end this session"
            )

    async def sample(self, prompt_ids_T: np.ndarray, *, max_new_tokens: int | None) -> Completion:
        """Not recorded yet. Raises ApiError; what the lease cannot survive ends the whole episode."""
        room = self.policy.max_model_len - prompt_ids_T.size
        if room < 1:
            self.is_cut = True
            raise too_long_error(self.policy.max_model_len, f"{prompt_ids_T.size} tokens")
        wanted = min(room, self.policy.max_new_tokens, max_new_tokens or self.policy.max_new_tokens)
        try:
            return await self.policy.sample(prompt_ids_T, max_new_tokens=wanted, call=next(self._numbers))
        except LeaseFailure as failure:
            self.fail(failure)
            raise ApiError(503, failure.kind, "the episode has failed; this session takes no more calls") from failure

    def record(self, prompt_ids_T: np.ndarray, completion: Completion, *, is_cut: bool) -> None:
        """The agent is about to read the completion. is_cut: the policy would have said more."""
        self._recorder.record(prompt_ids_T, completion)
        self.is_cut = is_cut

    def set_reward(self, value: object) -> None:
        """The last one counts. Raises EnvironmentFailure for what is no plausible number."""
        if self._ended.is_set():
            raise ended_error()
        self.note_activity()
        try:
            self.reward = check_reward(value)
        except EnvironmentFailure as failure:
            self.reward, self._bad_reward = None, failure
            raise

    def end(self, *, truncated: bool = False) -> None:
        """Calls that still run are cut off: nobody reads them."""
        self.is_cut |= truncated
        self._ended.set()

    # --- for the runner of the episode -------------------------------------------------------------------------------

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """What runs inside is cut off by the LeaseFailure of any call, which is raised; then nothing can be called."""
        try:
            async with asyncio.timeout(None) as self._scope:
                yield
        except TimeoutError as error:
            if self._lease_failure is None:
                raise
            raise self._lease_failure from error
        finally:
            self._ended.set()
            await self._calls.close()

    def fail(self, failure: LeaseFailure) -> None:
        self._lease_failure = self._lease_failure or failure
        if self._scope is not None and not self._ended.is_set():
            self._scope.reschedule(asyncio.get_running_loop().time())

    def trajectories(self, outcome: Outcome) -> list[Trajectory]:
        """One for each list of ids; raises EnvironmentFailure when nothing was sampled."""
        if self.num_calls == 0:
            raise EnvironmentFailure("environment_error", "the agent ended without a single answer of the policy")
        is_cut = outcome.truncated or self.is_cut
        return self._recorder.trajectories(
            check_reward(outcome.reward), FinishReason.TRUNCATED if is_cut else FinishReason.TERMINATED
        )


def ended_error() -> ApiError:
    return ApiError(410, "session_ended", "this session has ended")
