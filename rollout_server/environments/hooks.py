"""A user's own functions between texts and an environment, named by module:function."""

import asyncio
import importlib
from collections.abc import Callable, Mapping
from typing import Any

from rollout_server.environments.environment import EnvironmentFailure, Observation, are_messages
from rollout_server.environments.openenv_texts import BadAction

Hook = Callable[..., Any]


def load_hook(name: str) -> Hook | None:
    """None for no name; raises ValueError, naming it, for what is no function."""
    if not name:
        return None
    module, separator, function = name.partition(":")
    if not separator:
        raise ValueError(f"{name!r} names no function; write module:function")
    try:
        hook = getattr(importlib.import_module(module), function, None)
    except ImportError as error:
        raise ValueError(f"{name}: {error}") from error
    if not callable(hook):
        raise ValueError(f"module {module} has no function {function}")  # noqa: TRY004 - a name that a person wrote
    return hook  # type: ignore[no-any-return]  # what it returns is checked


async def parse_action(hook: Hook, text: str, schema: Mapping[str, Any], *, timeout_s: float) -> dict[str, Any]:
    """hook(text, schema) -> action; its ValueError means that the text is none, and becomes BadAction."""
    try:
        action = await _in_thread(hook, text, schema, timeout_s=timeout_s)
    except ValueError as error:
        raise BadAction(str(error)) from error
    if not isinstance(action, dict):
        raise EnvironmentFailure("environment_error", f"parse_action returned {type(action).__name__}, not a dict")
    return action


async def format_observation(hook: Hook, observation: Mapping[str, Any], *, timeout_s: float) -> Observation:
    """hook(observation) -> a text or chat messages."""
    try:
        shown = await _in_thread(hook, observation, timeout_s=timeout_s)
    except ValueError as error:
        raise EnvironmentFailure("environment_error", f"format_observation: {error}") from error
    if isinstance(shown, str):
        return shown
    if not are_messages(shown):
        raise EnvironmentFailure(
            "environment_error", f"format_observation returned {type(shown).__name__}, not a text or chat messages"
        )
    return shown  # type: ignore[no-any-return]


async def _in_thread(hook: Hook, *arguments: Any, timeout_s: float) -> Any:
    """A hook that takes long keeps its own episode waiting, and nobody else."""
    name = getattr(hook, "__name__", "the hook")
    try:
        async with asyncio.timeout(timeout_s):
            return await asyncio.to_thread(hook, *arguments)
    except TimeoutError as error:
        raise EnvironmentFailure("environment_timeout", f"{name} took longer than {timeout_s:g} s") from error
    except ValueError:
        raise
    except Exception as error:  # whatever the user's code raises
        raise EnvironmentFailure("environment_error", f"{name} raised {type(error).__name__}: {error}") from error
