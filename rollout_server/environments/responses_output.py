"""What the policy said, in OpenAI's Responses format, and the tools that it may call. Pure functions of JSON values."""

import json
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rollout_server.environments.openenv_texts import TOOL_FORM, BadAction, tool_call, tool_instructions

_TOOL_CALL = re.compile(r"<tool_call>.*?</tool_call>", re.DOTALL)
_END_OF_THOUGHTS = "</think>"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """One call of a tool by the policy."""

    call_id: str
    name: str
    arguments: Mapping[str, Any]


def tools_of(params: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The functions that the policy may call, by name."""
    tools = params.get("tools")
    return {
        tool["name"]: {name: tool[name] for name in ("name", "description", "parameters") if tool.get(name)}
        for tool in (tools if isinstance(tools, list) else [])
        if isinstance(tool, dict) and tool.get("type") == "function" and isinstance(tool.get("name"), str)
    }


def told_of_tools(messages: Sequence[Mapping[str, Any]], tools: Sequence[Any]) -> list[Mapping[str, Any]]:
    """The chat, with what the policy must know of its tools in the system message."""
    if not tools:
        return list(messages)
    said = tool_instructions(tools)
    first, *others = messages
    if first["role"] == "system" and isinstance(first["content"], str):
        return [{**first, "content": f"{first['content']}\n\n{said}"}, *others]
    return [{"role": "system", "content": said}, *messages]


def output_items(text: str, *, has_tools: bool) -> tuple[list[dict[str, Any]], list[ToolCall]]:
    """What the policy said as the output of a response, and the calls in it; raises BadAction for a broken call."""
    thoughts, end, answer = text.rpartition(_END_OF_THOUGHTS)
    calls = [_call(block) for block in _TOOL_CALL.findall(answer)] if has_tools else []
    said = _TOOL_CALL.sub("", answer).strip() if calls else answer
    if has_tools and "<tool_call>" in said:
        raise BadAction(f"a tool call must look like <tool_call>{TOOL_FORM}</tool_call>")
    items: list[dict[str, Any]] = []
    if end:
        summary = [{"type": "summary_text", "text": thoughts.removeprefix("<think>").strip()}]
        items.append({"type": "reasoning", "id": _new_id("rs"), "summary": summary})
    if said or not calls:
        content = [{"type": "output_text", "text": said, "annotations": []}]
        message = {"type": "message", "role": "assistant", "status": "completed", "content": content}
        items.append(message | {"id": _new_id("msg")})
    items += [
        {"type": "function_call", "call_id": call.call_id, "name": call.name, "arguments": json.dumps(call.arguments)}
        for call in calls
    ]
    return items, calls


def _call(block: str) -> ToolCall:
    action = tool_call(block)
    return ToolCall(call_id=_new_id("call"), name=action["tool_name"], arguments=action["arguments"])


def tool_output_item(call_id: str, output: str) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call_id, "output": output}


def response(items: Sequence[Mapping[str, Any]], *, is_complete: bool) -> dict[str, Any]:
    """A Responses object whose output these items are. is_complete: the policy ended by itself."""
    return {
        "id": _new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "model": "policy",
        "output": list(items),
        "status": "completed" if is_complete else "incomplete",
        "incomplete_details": None if is_complete else {"reason": "max_output_tokens"},
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],  # those of the row are in the row
    }


def _new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
