"""What a worker process runs: a user's reward function, or a user's class with reset and step."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import msgspec

from rollout_server.environments.environment import EnvironmentFailure, are_messages, check_reward, step_reward
from rollout_server.environments.frames import Call, Outcome

STEP_FORM = "step must return (observation, reward, done) or (observation, reward, terminated, truncated, info)"


class Target(Protocol):
    """The user's code. begin(call) calls it, finish(call, value) makes an answer of what it returned or resolved to."""

    is_async: bool
    has_episodes: bool

    def begin(self, call: Call) -> Any: ...

    def finish(self, call: Call, value: Any) -> Outcome:
        """Raises EnvironmentFailure for what is no answer."""
        ...


class RewardFunction:
    """function(prompt, completion, row) -> float."""

    has_episodes = False

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.is_async = _is_async(function)

    def begin(self, call: Call) -> Any:
        return self._function(call.prompt, call.completion, msgspec.json.decode(call.row))

    def finish(self, call: Call, value: Any) -> Outcome:
        return Outcome(call.call_id, check_reward(value))


class EpisodeClass:
    """A class without arguments; one instance for each episode. See PythonCode for its methods."""

    has_episodes = True

    def __init__(self, kind: type[Any], *, max_observation_bytes: int) -> None:
        self._kind = kind
        self._max_observation_bytes = max_observation_bytes
        self._episodes: dict[int, Any] = {}
        self._reset_takes = inspect.signature(kind.reset).parameters
        self.is_async = _is_async(kind.reset) or _is_async(kind.step)

    def begin(self, call: Call) -> Any:
        match call.verb:
            case "reset":
                episode = self._episodes[call.episode_id] = self._kind()
                given = {"row": msgspec.json.decode(call.row), "seed": call.seed}
                return episode.reset(**{name: value for name, value in given.items() if name in self._reset_takes})
            case "close":
                episode = self._episodes.pop(call.episode_id, None)
                return episode.close() if hasattr(episode, "close") else None
            case _:
                return self._episodes[call.episode_id].step(call.completion)

    def finish(self, call: Call, value: Any) -> Outcome:
        if call.verb == "reset":
            return Outcome(call.call_id, 0.0, observation=self._observation(value), done=False)
        observation, reward, done, truncated = _parts(value)
        return Outcome(
            call.call_id,
            step_reward(reward, done=done),
            observation="" if done else self._observation(observation),
            done=done,
            truncated=truncated,
        )

    def _observation(self, value: object) -> Any:
        if not isinstance(value, str) and not are_messages(value):
            raise EnvironmentFailure(
                "environment_error", f"an observation must be a text or a list of messages, got {type(value).__name__}"
            )
        try:
            num_bytes = len(msgspec.json.encode(value))
        except (TypeError, ValueError) as error:
            raise EnvironmentFailure("environment_error", f"an observation cannot be sent as JSON: {error}") from error
        if num_bytes > self._max_observation_bytes:
            raise EnvironmentFailure(
                "environment_error",
                f"an observation of {num_bytes} bytes; max_reply_bytes allows {self._max_observation_bytes}",
            )
        return value


def _parts(value: object) -> tuple[object, object, bool, bool]:
    """observation, reward, done, truncated"""
    if not isinstance(value, tuple) or len(value) not in (3, 5):
        raise EnvironmentFailure("environment_error", f"{STEP_FORM}; got {type(value).__name__}")
    flags = [_flag(flag) for flag in value[2:4]] if len(value) == 5 else [_flag(value[2]), False]
    return value[0], value[1], any(flags), flags[1] and not flags[0]


def _flag(value: object) -> bool:
    if not isinstance(value, bool) and type(value).__name__ not in ("bool", "bool_"):  # numpy's are as good
        raise EnvironmentFailure("environment_error", f"{STEP_FORM}; done was {type(value).__name__}")
    return bool(value)


def target_of(value: object, name: str, *, max_observation_bytes: int) -> Target:
    """Raises TypeError, saying what is missing, for what is neither a reward function nor such a class."""
    if inspect.isclass(value) and callable(getattr(value, "reset", None)) and callable(getattr(value, "step", None)):
        return EpisodeClass(value, max_observation_bytes=max_observation_bytes)
    if inspect.isclass(value):
        raise TypeError(f"{name} is a class without the methods reset and step")
    if not callable(value):
        raise TypeError(f"{name} is not a function but a {type(value).__name__}")
    arguments: tuple[str, str, Mapping[str, Any]] = ("prompt", "completion", {})
    try:
        inspect.signature(value).bind(*arguments)
    except TypeError as error:
        raise TypeError(f"{name} must take (prompt, completion, row): {error}") from error
    return RewardFunction(value)


def _is_async(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
