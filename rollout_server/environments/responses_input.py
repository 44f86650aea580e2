"""What OpenAI's Responses format asks of a model, as chat messages. Pure functions of JSON values."""

import json
from typing import Any

PARAMS = "responses_create_params"
"""The key of a NeMo Gym row that holds what the model is to be asked."""


class UnusableInput(ValueError):
    """What the model is to be asked cannot be said in texts."""


def chat_messages(params: object) -> list[dict[str, Any]]:
    """The chat that responses_create_params holds; raises UnusableInput."""
    if not isinstance(params, dict):
        raise UnusableInput(f"{PARAMS} must be an object, got {type(params).__name__}")
    items = params.get("input")
    if isinstance(items, str):
        items = [{"role": "user", "content": items}]
    if not isinstance(items, list) or not items:
        raise UnusableInput(f'{PARAMS} has no "input", which must be a text or a list of messages')
    instructions = params.get("instructions")
    before = [{"role": "system", "content": instructions}] if isinstance(instructions, str) and instructions else []
    return before + [_message(item) for item in items]


def _message(item: object) -> dict[str, Any]:
    """One item of the input as a chat message."""
    if not isinstance(item, dict):
        raise UnusableInput(f"an item of the input must be an object, got {type(item).__name__}")
    match item.get("type", "message"):
        case "message" if isinstance(item.get("role"), str):
            role = "system" if item["role"] == "developer" else item["role"]
            return {"role": role, "content": _text(item.get("content"))}
        case "function_call":
            call = {"name": item.get("name"), "arguments": _arguments(item.get("arguments"))}
            return {"role": "assistant", "content": f"<tool_call>\n{json.dumps(call)}\n</tool_call>"}
        case "function_call_output":
            return {"role": "user", "content": tool_response(_text(item.get("output")))}
    raise UnusableInput(f"an item of the input is of type {str(item.get('type'))[:40]!r}, which is no text")


def _text(content: object) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UnusableInput(f"the content of a message must be a text, got {type(content).__name__}")
    texts = [part.get("text") if isinstance(part, dict) else None for part in content]
    if not all(isinstance(text, str) for text in texts):
        raise UnusableInput("the content of a message has parts that are no texts")
    return "".join(str(text) for text in texts)


def _arguments(value: object) -> object:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def tool_response(output: str) -> str:
    """What a tool returned, as the policy reads it."""
    return f"<tool_response>\n{output}\n</tool_response>"
