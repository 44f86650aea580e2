"""Environment classes as users write them, good and bad. Imported by workers."""

import asyncio
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Guess:
    """Says higher or lower until the number in the row is guessed."""

    def reset(self, row: Mapping[str, Any], seed: int) -> str:
        self.number = row["number"]
        self.seed = seed
        return f"{row['prompt']} (seed {seed})"

    def step(self, text: str) -> tuple[str, float, bool]:
        if int(text) == self.number:
            return "", 1.0, True
        return ("lower" if int(text) > self.number else "higher"), -0.25, False


class AsyncGuess(Guess):
    async def reset(self, row: Mapping[str, Any], seed: int) -> str:  # type: ignore[override]
        await asyncio.sleep(0)
        return super().reset(row, seed)

    async def step(self, text: str) -> tuple[str, float, bool]:  # type: ignore[override]
        await asyncio.sleep(0)
        return super().step(text)


class Obeys:
    """Does what it is told; its instances in this process are counted."""

    instances = 0

    def reset(self) -> str:
        type(self).instances += 1
        return "do"

    def close(self) -> None:
        type(self).instances -= 1

    def step(self, text: str) -> Any:
        action, _, argument = text.partition(" ")
        return getattr(self, f"do_{action}")(argument)

    def do_say(self, text: str) -> Any:
        return text, 0.0, False

    def do_chat(self, text: str) -> Any:
        return [{"role": "tool", "content": text}], None, False

    def do_five(self, text: str) -> Any:
        terminated, truncated = (word == "True" for word in text.split())
        return "", 1.0, terminated, truncated, {"info": object()}

    def do_return(self, text: str) -> Any:
        return eval(text)

    def do_count(self, _: str) -> Any:
        return str(type(self).instances), 0.0, False

    def do_process(self, _: str) -> Any:
        return str(os.getpid()), 0.0, False

    def do_raise(self, text: str) -> Any:
        raise KeyError(text)

    def do_die(self, _: str) -> Any:
        os._exit(3)

    def do_hang(self, _: str) -> Any:
        threading.Event().wait()


class ObeysAsync(Obeys):
    async def step(self, text: str) -> Any:
        if text == "hang":
            await asyncio.Event().wait()
        return super().step(text)


class FailsAtReset:
    def reset(self, row: Mapping[str, Any]) -> str:
        raise LookupError(row["prompt"])

    def step(self, text: str) -> Any:
        raise NotImplementedError


class Leaves:
    """Writes down that it was closed."""

    def reset(self, row: Mapping[str, Any]) -> str:
        self.path = Path(row["path"])
        return "go"

    def step(self, text: str) -> Any:
        return "on", 0.0, False

    def close(self) -> None:
        self.path.write_text("closed")


class Half:
    def reset(self) -> str:
        return "no step"
