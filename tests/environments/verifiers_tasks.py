"""A taskset of verifiers whose tasks say what happens: `reward 0.5`, `nan`, `raise x`, `hang`.

Runs where verifiers is installed.

The harness runs in the server's process, as verifiers allows, so that no program is fetched when a test begins; its
calls go through verifiers' own interception, as those of all harnesses.
"""

import asyncio
from collections.abc import Iterable
from typing import Any

import verifiers.v1 as vf
from openai import AsyncOpenAI
from verifiers.v1.configs.harness import HarnessConfig
from verifiers.v1.configs.taskset import TasksetConfig

__all__ = ["ToldHarness", "ToldTaskset"]


class ToldData(vf.TaskData):
    turns: int = 1
    does: str = "reward 1"


class ToldTask(vf.Task[ToldData]):
    @vf.reward(weight=2.0)
    async def told(self, task: ToldData) -> Any:
        word, _, argument = task.does.partition(" ")
        if word == "raise":
            raise KeyError(argument)
        if word == "hang":
            await asyncio.sleep(3600)
        return {"nan": float("nan"), "infinity": float("inf"), "huge": 1e30}.get(word) or float(argument) / 2

    @vf.reward(weight=0.0)
    async def unused(self) -> float:
        return 7.0


class ToldTaskset(vf.Taskset[ToldTask, TasksetConfig]):
    def load(self) -> Iterable[ToldTask]:
        yield ToldTask(ToldData(prompt="do"))


class ToldHarness(vf.Harness[HarnessConfig]):
    """Asks `turns` times, and says "more" in between."""

    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self, ctx: Any, trace: Any, runtime: Any, endpoint: str, secret: str, mcp_urls: Any, data: Any
    ) -> Any:
        chat: list[Any] = [{"role": "user", "content": data.prompt}]
        async with AsyncOpenAI(base_url=endpoint, api_key=secret, max_retries=0) as client:
            for turn in range(data.turns):
                if turn:
                    chat.append({"role": "user", "content": "more"})
                answer = await client.chat.completions.create(model=ctx.model, messages=chat, stream=turn % 2 == 1)
                if turn % 2 == 1:
                    text = "".join([chunk.choices[0].delta.content or "" async for chunk in answer if chunk.choices])
                else:
                    text = answer.choices[0].message.content or ""
                chat.append({"role": "assistant", "content": text})
        return vf.ProgramResult(exit_code=0, stdout="", stderr="")
