"""Tool calls in what the policy says: the Hermes format, which Qwen's models and many others use."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of a tool by the policy."""

    name: str
    arguments: str  # JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsed:
    """What the policy said: words for people, and calls."""

    content: str
    calls: tuple[Call, ...] = ()

    def __eq__(self, other: object) -> bool:
        """Whatever white space is around the words, and in the arguments."""
        return isinstance(other, Parsed) and self._meaning() == other._meaning()

    def __hash__(self) -> int:
        return hash(self.content.strip())

    def _meaning(self) -> object:
        return self.content.strip(), [(call.name, canonical(call.arguments)) for call in self.calls]


class ToolParser(Protocol):
    """How a model writes tool calls."""

    def parse(self, text: str, tools: Sequence[Mapping[str, Any]]) -> Parsed:
        """text: special tokens included, without the one that ends the turn. Without usable calls it is the content."""
        ...


class HermesTools:
    """<tool_call>{"name": ..., "arguments": {...}}</tool_call>, as often as the policy likes."""

    def parse(self, text: str, tools: Sequence[Mapping[str, Any]]) -> Parsed:
        del tools  # an agent has to cope with calls of what there is not
        calls = [_call(block) for block in _CALL.findall(text)]
        read = tuple(call for call in calls if call is not None)
        if not read or len(read) < len(calls):
            return Parsed(content=text)
        return Parsed(content=text[: text.index("<tool_call>")], calls=read)


def _call(block: str) -> Call | None:
    try:
        call = json.loads(block)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments")
    if not isinstance(arguments, dict):
        return None
    return Call(name=call["name"], arguments=json.dumps(arguments, ensure_ascii=False))


def canonical(arguments: str) -> str:
    """The same text for the same arguments."""
    try:
        return json.dumps(json.loads(arguments), sort_keys=True)
    except (ValueError, RecursionError):
        return arguments
