"""nemo-gym+http://host:port: episodes of a NeMo Gym resources server, of both styles, with one session for each."""

import re
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self

from common.environments import EnvironmentSettings
from rollout_server.environments.environment import (
    EnvironmentFailure,
    Episode,
    FailureKind,
    Observation,
    Row,
    Said,
    StepResult,
    check_reward,
    step_reward,
)
from rollout_server.environments.http_server import HttpFailure
from rollout_server.environments.nemo_gym_servers import INTERNAL_ERROR, Begun, NemoGymServers, Replica
from rollout_server.environments.openenv_texts import BadAction
from rollout_server.environments.responses_input import PARAMS, tool_response
from rollout_server.environments.responses_output import (
    ToolCall,
    output_items,
    response,
    told_of_tools,
    tool_output_item,
    tools_of,
)

_TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")  # it becomes a path
_OWN_ROUTES = {"verify", "seed_session", "close_session", "aggregate_metrics", "reverify_mode", "mcp", "reset", "step"}
_SHOWN_STATUSES = (404, 405, INTERNAL_ERROR)  # besides refusals of this request: NeMo Gym's agents show them too


class NemoGym:
    """The row goes to the server as it is. Where it has a "prompt" of its own, that is what the policy reads.

    The tools of the row are told to the policy, and called as often as it asks for them; what it says without a call is
    what is verified. A server of the Gymnasium style answers every turn.
    """

    def __init__(self, url: str, settings: EnvironmentSettings) -> None:
        """Raises ValueError for a malformed URL."""
        self.url = url
        self.settings = settings
        self.servers = NemoGymServers([Replica(each, settings) for each in (url, *settings.replicas)], settings)
        self.num_bad_actions = 0

    def __repr__(self) -> str:
        return f"<NemoGym {self.url}, {self.servers!r}, {self.num_bad_actions} bad actions>"

    async def __aenter__(self) -> Self:
        await self.servers.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.servers.__aexit__(kind, error, trace)

    @asynccontextmanager
    async def episode(self, row: Row, *, seed: int) -> AsyncIterator[Episode]:
        del seed  # the protocol has no place for one
        episode = _Episode(self, row)
        try:
            yield episode
        finally:
            await episode.close()


class _Episode:
    def __init__(self, environment: NemoGym, row: Row) -> None:
        self._environment = environment
        self._prompt = row.prompt
        self._params = _params(row)
        self._row = {**row.fields, PARAMS: self._params}
        self._tools = tools_of(self._params)
        self._begun: Begun | None = None
        self._output: list[Mapping[str, Any]] = []  # of all turns
        self._is_done = False

    async def reset(self) -> Observation:
        begun = self._begun = await self._environment.servers.begin(self._row)
        first = _observation(begun.reply) if begun.style == "step" else ""
        prompt = self._prompt
        if isinstance(prompt, str):
            return prompt + first
        messages = told_of_tools(prompt, list(self._tools.values()))
        return [*messages, {"role": "user", "content": first}] if first else messages

    async def step(self, said: Said) -> StepResult:
        begun = self._begun
        assert begun is not None, "reset comes first"
        assert not self._is_done, "a server answers what comes after the end with a reward that means nothing"
        try:
            items, calls = output_items(said.text, has_tools=bool(self._tools) and not said.is_cut)
        except BadAction:
            self._environment.num_bad_actions += 1
            self._is_done = True
            return StepResult(reward=self._environment.settings.bad_action_reward, done=True)
        self._output += items
        if begun.style == "step":
            result = await self._act(begun, items, is_complete=not said.is_cut)
        elif calls:
            result = await self._call(begun, calls)
        else:
            result = StepResult(reward=await self._verify(begun, is_complete=not said.is_cut), done=True)
        self._is_done = result.done
        return result

    # --- /verify at the end ------------------------------------------------------------------------------------------

    async def _call(self, begun: Begun, calls: list[ToolCall]) -> StepResult:
        outputs = []
        for call in calls:
            output = await self._tool_output(begun, call)
            self._output.append(tool_output_item(call.call_id, output))
            outputs.append(tool_response(output))

        async def end() -> float:
            self._is_done = True
            return await self._verify(begun, is_complete=False)

        return StepResult(reward=0.0, done=False, observation="\n".join(outputs), end=end)

    async def _tool_output(self, begun: Begun, call: ToolCall) -> str:
        """What the policy reads, refusals and errors of the tool included: they are there to be learned from."""
        if call.name not in self._tools or call.name in _OWN_ROUTES or not _TOOL_NAME.fullmatch(call.name):
            return f"there is no tool {call.name[:100]!r}; the tools are: {', '.join(self._tools)}"
        try:
            content = await begun.session.post(f"/{call.name}", call.arguments)
        except HttpFailure as failure:
            if failure.kind == "refused" or failure.status in _SHOWN_STATUSES:
                return failure.said or failure.reason
            kind: FailureKind = "environment_timeout" if failure.kind == "timeout" else "environment_error"
            raise EnvironmentFailure(kind, failure.reason) from failure
        return content.decode(errors="replace")

    async def _verify(self, begun: Begun, *, is_complete: bool) -> float:
        reply = await begun.session.ask(
            "/verify", self._row | {"response": response(self._output, is_complete=is_complete)}
        )
        if _flag(reply, "mask_sample"):
            reason = f"{reply.get('failure_kind') or 'no failure_kind'}: {reply.get('failure_reason') or 'no reason'}"
            raise EnvironmentFailure("masked", reason)
        return check_reward(reply.get("reward"))

    # --- /step for each turn -----------------------------------------------------------------------------------------

    async def _act(self, begun: Begun, items: list[dict[str, Any]], *, is_complete: bool) -> StepResult:
        body = self._row | {"response": response(items, is_complete=is_complete)}
        if _info(begun.reply).get("supports_step_idempotency") is True:
            body["_ng_step_request_id"] = uuid.uuid4().hex
        reply = await begun.session.ask("/step", body)
        terminated, truncated = _flag(reply, "terminated"), _flag(reply, "truncated")
        done = terminated or truncated
        outputs = [] if done else _tool_outputs(_info(reply))
        said = "" if done else _observation(reply)
        return StepResult(
            reward=step_reward(reply.get("reward"), done=done),
            done=done,
            truncated=truncated and not terminated,
            observation="\n".join([*outputs, said] if said else outputs),
        )

    async def close(self) -> None:
        """Servers that keep something for each session may free it; many do so by themselves."""
        begun, self._begun = self._begun, None
        if begun is None:
            return
        async with begun.stack:
            if begun.style == "verify" and begun.replica.closes:
                name = uuid.uuid4().hex
                body = {"resources_session_id": name, "episode_id": {"rollout_id": name, "attempt": 0}}
                begun.replica.closes = await begun.session.close("/close_session", body)
            elif _info(begun.reply).get("supports_explicit_close") is True:
                await begun.session.close("/close", {})


def _params(row: Row) -> dict[str, Any]:
    """responses_create_params of the row, made of its prompt where it has none."""
    params = row.fields.get(PARAMS)
    if isinstance(params, dict):
        return params
    prompt = row.prompt
    return {"input": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)}


def _observation(reply: Mapping[str, Any]) -> str:
    observation = reply.get("observation")
    if observation is not None and not isinstance(observation, str):
        raise EnvironmentFailure("environment_error", f"an observation came as {type(observation).__name__}")
    return observation or ""


def _info(reply: Mapping[str, Any]) -> Mapping[str, Any]:
    info = reply.get("info")
    return info if isinstance(info, dict) else {}


def _flag(reply: Mapping[str, Any], name: str) -> bool:
    value = reply.get(name, False)
    if value is not None and not isinstance(value, bool):
        raise EnvironmentFailure("environment_error", f"{name} came as {type(value).__name__}")
    return bool(value)


def _tool_outputs(info: Mapping[str, Any]) -> list[str]:
    outputs = info.get("tool_outputs")
    return [
        tool_response(str(one.get("output", "")))
        for one in (outputs if isinstance(outputs, list) else [])
        if isinstance(one, dict)
    ]
