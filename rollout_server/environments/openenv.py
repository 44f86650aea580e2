"""openenv+ws://host:port: episodes of an OpenEnv server (openenv-core 0.3, openenv 0.10), one socket for each."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import Any, Self

from common.environments import EnvironmentSettings
from rollout_server.environments.environment import (
    EnvironmentFailure,
    Episode,
    Observation,
    Row,
    Said,
    StepResult,
    step_reward,
)
from rollout_server.environments.hooks import format_observation, load_hook, parse_action
from rollout_server.environments.openenv_servers import OpenEnvServers, Replica
from rollout_server.environments.openenv_session import Session, SessionFailure
from rollout_server.environments.openenv_texts import (
    ActionSchema,
    BadAction,
    observation_text,
    tool_instructions,
)

SEEDS = 1 << 31  # what every environment's generator takes


class OpenEnv:
    """Each episode is a session of its own; it waits while the server is full, and begins anywhere else if it can.

    What the policy reads first is the row's prompt followed by what the environment says: after a text as it is, after
    chat messages as the next message of the user. The row's "reset", an object, goes to the environment's reset.
    """

    def __init__(self, url: str, settings: EnvironmentSettings) -> None:
        """Raises ValueError for a malformed URL, or hooks that are not there."""
        self.url = url
        self.settings = settings
        self.parse_action = load_hook(settings.parse_action)
        self.format_observation = load_hook(settings.format_observation)
        self.num_bad_actions = 0
        self.servers = OpenEnvServers([Replica(each, settings) for each in (url, *settings.replicas)], settings)
        self._schema: Mapping[str, Any] | None = None
        self._asking_for_schema = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<OpenEnv {self.url}, {self.servers!r}, {self.num_bad_actions} bad actions>"

    async def __aenter__(self) -> Self:
        await self.servers.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.servers.__aexit__(kind, error, trace)

    @asynccontextmanager
    async def episode(self, row: Row, *, seed: int) -> AsyncIterator[Episode]:
        episode = _SocketEpisode(self, row, seed % SEEDS)
        try:
            yield episode
        finally:
            await episode.end()

    # --- from texts to actions --------------------------------------------------------------------------------------

    async def schema(self) -> Mapping[str, Any]:
        """The JSON schema of an action, asked for once. Raises EnvironmentFailure."""
        async with self._asking_for_schema:
            if self._schema is None:
                self._schema = await self._ask_for_schema()
            return self._schema

    async def _ask_for_schema(self) -> Mapping[str, Any]:
        content = await self.servers.schemas()
        try:
            schema = json.loads(content)["action"]
            if self.parse_action is None:
                ActionSchema(schema)
        except (ValueError, KeyError, TypeError, RecursionError, AttributeError) as error:
            reason = f"{self.url}: /schema says nothing of use about actions: {error}"
            raise EnvironmentFailure("environment_unavailable", reason) from error
        return schema  # type: ignore[no-any-return]

    async def action(self, text: str) -> dict[str, Any]:
        """Raises BadAction for a text that is none, EnvironmentFailure for what is not the policy's fault."""
        schema = await self.schema()
        if self.parse_action is not None:
            return await parse_action(self.parse_action, text, schema, timeout_s=self.settings.step_timeout_s)
        return ActionSchema(schema).action(text)

    async def shown(self, observation: Mapping[str, Any]) -> Observation:
        if self.format_observation is None:
            return observation_text(observation)
        return await format_observation(self.format_observation, observation, timeout_s=self.settings.step_timeout_s)


class _SocketEpisode:
    def __init__(self, environment: OpenEnv, row: Row, seed: int) -> None:
        self._environment = environment
        self._row = row
        self._seed = seed
        self._stack: AsyncExitStack | None = None
        self._session: Session | None = None

    async def end(self) -> None:
        if self._stack is not None:
            await self._stack.aclose()

    async def reset(self) -> Observation:
        schema = await self._environment.schema()
        own = self._row.fields.get("reset")
        data = {"seed": self._seed} | (own if isinstance(own, dict) else {})
        self._stack, self._session, reply = await self._environment.servers.begin(data)
        observation, done = _parts(reply)
        if done:
            raise EnvironmentFailure("environment_error", "the episode was done before it began")
        instructions = "" if self._environment.parse_action else await self._instructions(schema)
        return _joined(self._row.prompt, instructions, await self._environment.shown(observation))

    async def _instructions(self, schema: Mapping[str, Any]) -> str:
        """What the policy must be told of the environment's tools."""
        if not ActionSchema(schema).is_tool_call:
            return ""
        request = {"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {}}
        reply = await self._request("mcp", request, answer="mcp")
        result = reply.get("result")
        tools = result.get("tools") if isinstance(result, dict) else None
        if not isinstance(tools, list):
            raise EnvironmentFailure("environment_error", "the environment does not say which tools it has")
        return tool_instructions(tools) + "\n"

    async def step(self, said: Said) -> StepResult:
        try:
            action = await self._environment.action(said.text)
            reply = await self._request("step", action, answer="observation")
        except BadAction:
            self._environment.num_bad_actions += 1
            return StepResult(reward=self._environment.settings.bad_action_reward, done=True)
        observation, done = _parts(reply)
        return StepResult(
            reward=step_reward(reply.get("reward"), done=done),
            done=done,
            observation="" if done else await self._environment.shown(observation),  # the last one may hold the answer
        )

    async def _request(self, kind: str, data: Mapping[str, Any], *, answer: str) -> dict[str, Any]:
        assert self._session is not None, "reset comes first"
        try:
            return await self._session.request(
                kind, data, answer=answer, timeout_s=self._environment.settings.step_timeout_s
            )
        except SessionFailure as failure:
            if failure.kind == "bad_action":
                raise BadAction(failure.reason) from failure
            if failure.kind == "timeout":
                raise EnvironmentFailure("environment_timeout", failure.reason) from failure
            raise EnvironmentFailure("environment_error", failure.reason) from failure


def _parts(reply: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """observation, done"""
    observation, done = reply.get("observation"), reply.get("done")
    if not isinstance(observation, dict):
        raise EnvironmentFailure("environment_error", f"an observation came as {type(observation).__name__}")
    if not isinstance(done, bool):
        raise EnvironmentFailure("environment_error", f"done came as {type(done).__name__}")
    return observation, done


def _joined(prompt: Observation, instructions: str, first: Observation) -> Observation:
    if isinstance(prompt, str) and isinstance(first, str):
        return prompt + instructions + first
    if isinstance(prompt, str):
        prompt = [{"role": "system", "content": prompt}]
    if isinstance(first, str):
        *before, last = prompt
        if last["role"] == "user" and isinstance(last["content"], str):  # many templates want roles to alternate
            return [*before, {**last, "content": f"{last['content']}\n\n{instructions}{first}"}]
        first = [{"role": "user", "content": instructions + first}]
    elif instructions:
        first = [{"role": "system", "content": instructions}, *first]
    return [*prompt, *first]
