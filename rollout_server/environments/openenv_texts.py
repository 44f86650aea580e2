"""Between texts of the policy and OpenEnv's actions and observations: pure functions of JSON values."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rollout_server.environments.environment import Observation, are_messages

_TOOL_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_NOT_FOR_THE_POLICY = {"metadata", "reward", "done"}
_TEXT_FIELDS = ("prompt", "question", "text", "message", "content", "observation", "instruction", "output")
TOOL_FORM = '{"name": ..., "arguments": {...}}'


class BadAction(ValueError):
    """What the policy said is no action of this environment: its own fault, not the environment's."""


class UnmappableSchema(ValueError):
    """It cannot be known how a text becomes an action; parse_action must say."""


class ActionSchema:
    """The JSON schema of an environment's action, as /schema says it.

    A text becomes the value of the one field that an action needs. An action of several fields, or one that is an
    object, is read as JSON. A tool call is read as JSON too, inside <tool_call> or as the whole text.
    """

    def __init__(self, schema: Mapping[str, Any]) -> None:
        """Raises UnmappableSchema for what is no schema of an object with fields."""
        properties = schema.get("properties")
        if not isinstance(properties, dict):
            raise UnmappableSchema(f"the schema of the action has no fields: {json.dumps(schema)[:300]}")
        self._fields = {name: field for name, field in properties.items() if name != "metadata"}
        required = schema.get("required", [])
        needed = [name for name in self._fields if name in required] or list(self._fields)
        if not needed:
            raise UnmappableSchema("the action has no fields; set parse_action")
        self.is_tool_call = {"tool_name", "arguments"} <= self._fields.keys()
        self._only = needed[0] if len(needed) == 1 else None

    def action(self, text: str) -> dict[str, Any]:
        """Raises BadAction."""
        if self.is_tool_call:
            return tool_call(text)
        if self._only is None:
            return _object(text, "an action")
        return {self._only: _value(text, self._fields[self._only])}


def tool_call(text: str) -> dict[str, Any]:
    """OpenEnv's action for the first tool call in the text; raises BadAction when there is none."""
    match = _TOOL_CALL.search(text)
    call = _object(match[1] if match else text, "a tool call")
    name = call.get("name", call.get("tool_name"))
    arguments = call.get("arguments", call.get("parameters", {}))
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise BadAction(f"a tool call must look like {TOOL_FORM}")
    return {"type": "call_tool", "tool_name": name, "arguments": arguments}


def tool_instructions(tools: Sequence[Any]) -> str:
    """What the policy is told about the tools of the environment."""
    lines = [json.dumps(tool, ensure_ascii=False) for tool in tools]
    return "\n".join(["Tools:", *lines, f"Call one with <tool_call>{TOOL_FORM}</tool_call>"])


def _object(text: str, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadAction(f"{what} must be a JSON object: {error}") from error
    if not isinstance(value, dict):
        raise BadAction(f"{what} must be a JSON object, got {type(value).__name__}")
    return value


def _value(text: str, field: object) -> Any:
    """The text as the type that the field wants."""
    kinds = _kinds(field)
    if not kinds or "string" in kinds:
        return text
    try:
        value = json.loads(text.strip())
    except (ValueError, RecursionError) as error:
        raise BadAction(f"the action must be {' or '.join(sorted(kinds))}: {error}") from error
    return value


def _kinds(field: object) -> set[str]:
    """The JSON types that a field may have; empty when it does not say."""
    if not isinstance(field, dict):
        return set()
    options = field.get("anyOf")
    if isinstance(options, list):
        return set().union(*(_kinds(option) for option in options)) - {"null"}
    kind = field.get("type")
    return {kind} if isinstance(kind, str) else set()


def observation_text(observation: Mapping[str, Any]) -> Observation:
    """What the policy reads: chat messages, the result of a tool, the text in a field of a usual name or in the only
    field; else everything as JSON."""
    fields = {
        name: value
        for name, value in observation.items()
        if name not in _NOT_FOR_THE_POLICY and value not in (None, "", [], {})
    }
    if "tool_name" in fields:
        return tool_result(fields)
    messages = fields.get("messages")
    if are_messages(messages):
        return list(messages)  # type: ignore[arg-type]
    if isinstance(messages, list) and all(isinstance(one, dict) and "content" in one for one in messages):
        return "\n".join(str(message["content"]) for message in messages)
    names = [*_TEXT_FIELDS, *fields] if len(fields) == 1 else _TEXT_FIELDS
    texts = [fields[name] for name in names if isinstance(fields.get(name), str)]
    return texts[0] if texts else json.dumps(fields, ensure_ascii=False)


def tool_result(fields: Mapping[str, Any]) -> str:
    """The text of what a tool returned, or of its error, which the policy may learn from."""
    error = fields.get("error")
    if isinstance(error, dict):
        return f"{error.get('error_type', 'error')}: {error.get('message', '')}"
    result = fields.get("result")
    if isinstance(result, dict):
        if result.get("data") is not None:
            result = result["data"]
        elif isinstance(result.get("content"), list):
            parts = [part.get("text") for part in result["content"] if isinstance(part, dict)]
            return "\n".join(part for part in parts if isinstance(part, str))
    return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
