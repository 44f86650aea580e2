"""Which environments a run has, and the settings of each: what a person writes, and what rollout servers are told."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Self

import msgspec
from msgspec import Meta

MAX_ENVIRONMENTS = 64
ENVIRONMENT_UNAVAILABLE = "environment_unavailable"
"""Kind of failure of a lease whose environment could not be reached: neither the task's fault nor the server's."""

Address = Annotated[str, Meta(min_length=1, max_length=512)]
PositiveSeconds = Annotated[float, Meta(gt=0.0, le=1e6)]
AtLeastOne = Annotated[int, Meta(ge=1, le=1 << 20)]


class EnvironmentSettings(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Limits that every kind of environment keeps to; the keys of an environment's TOML table."""

    step_timeout_s: PositiveSeconds = 30.0  # of one call
    episode_timeout_s: PositiveSeconds = 1800.0  # from reset to done, the policy's own time included
    start_timeout_s: PositiveSeconds = 60.0  # of a kind that runs processes of its own
    max_turns: AtLeastOne = 64  # then an episode that is not done is truncated
    max_observation_tokens: AtLeastOne | None = None  # longer ones are cut, with a mark; None: as many as fit
    max_concurrent: AtLeastOne = 4096  # calls, or episodes, under way at once, for each server process
    workers: AtLeastOne = 1  # processes, of a kind that runs its own
    replicas: Annotated[tuple[Address, ...], Meta(max_length=256)] = ()  # more URLs of the same environment
    tries: AtLeastOne = 5  # of a request that may be repeated
    capacity_timeout_s: PositiveSeconds = 60.0  # how long an episode waits for a server that is full
    max_reply_bytes: Annotated[int, Meta(ge=1, le=1 << 30)] = 4 << 20
    max_batch: AtLeastOne = 64  # completions in one request to a reward model
    bad_action_reward: Annotated[float, Meta(ge=-1e9, le=1e9)] = 0.0  # of what the policy said that is no action
    parse_action: Annotated[str, Meta(max_length=256)] = ""  # module:function of the user; empty: one required field
    format_observation: Annotated[str, Meta(max_length=256)] = ""  # likewise; empty: the observation's text


class EnvironmentSpec(EnvironmentSettings, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One environment of a run."""

    name: Address  # as leases say it
    url: Address
    weight: Annotated[float, Meta(gt=0.0, le=1e6)] = 1.0  # its share of the tasks, relative to the others
    data: Annotated[str, Meta(max_length=4096)] = ""  # where its rows come from; empty: the run's data


@dataclass(frozen=True, slots=True)
class Environments:
    """A setting: a URL, or a table of tables, one for each environment, by name."""

    specs: tuple[EnvironmentSpec, ...]

    @classmethod
    def at(cls, url: str) -> Self:
        """One environment, whose name is its URL."""
        return cls((msgspec.convert({"name": url, "url": url}, EnvironmentSpec),))

    @classmethod
    def from_toml(cls, value: object) -> Self:
        """Raises ValueError, naming the environment and the key, for what is neither."""
        if isinstance(value, str):
            return cls((_spec(value, {"url": value}),))
        if not isinstance(value, Mapping) or not value:
            raise ValueError(f"must be a URL, or a table for each environment, got {value!r}")
        if len(value) > MAX_ENVIRONMENTS:
            raise ValueError(f"names {len(value)} environments, at most {MAX_ENVIRONMENTS} are possible")
        return cls(tuple(_spec(name, fields) for name, fields in value.items()))

    def to_toml(self) -> object:
        """What from_toml reads back."""
        tables = {spec.name: msgspec.to_builtins(spec) for spec in self.specs}
        for table in tables.values():
            del table["name"]
        [(name, table), *others] = tables.items()
        return name if table == {"url": name} and not others else tables


def _spec(name: str, fields: object) -> EnvironmentSpec:
    if not isinstance(fields, Mapping):
        raise ValueError(f'{name}: must be a table with a url, like {{url = "python:my_rewards:score"}}')  # noqa: TRY004 - written by people
    values = {key: _without_nan(name, key, value) for key, value in fields.items()}
    try:
        return msgspec.convert(values | {"name": name}, EnvironmentSpec)
    except msgspec.ValidationError as error:
        known = ", ".join(field for field in EnvironmentSpec.__struct_fields__ if field != "name")
        raise ValueError(f"{name}: {error}; an environment's keys are: {known}") from error


def _without_nan(name: str, key: str, value: Any) -> Any:
    if isinstance(value, float) and math.isnan(value):
        raise ValueError(f"{name}.{key} must be a number, got {value}")
    return value
