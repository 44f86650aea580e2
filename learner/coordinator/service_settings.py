"""ServiceSettings: what the coordinator process is told by the learner that starts it, as a JSON file."""

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from common.environments import MAX_ENVIRONMENTS, EnvironmentSpec
from common.lifecycle import UserError
from common.messages import RelayWeights
from learner.coordinator.settings import CoordinatorSettings


class HeldOut(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How held-out tasks are sampled; how many there are say the rules."""

    data: str = ""  # as `prompts`; empty: taken out of those
    samples: Annotated[int, Meta(ge=1, le=4096)]
    temperature: Annotated[float, Meta(ge=0.0, le=100.0)]  # 0: always the likeliest token
    hold_s: Annotated[float, Meta(ge=0.0, le=1e12)]  # see messages.HoldVersions


class ServiceSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything but what OpenRun says. Paths are absolute."""

    run_id: Annotated[str, Meta(min_length=1, max_length=128)]
    learner_socket: str  # ipc://..., bound by the coordinator
    listen: str  # tcp://HOST:PORT for rollout servers; port 0 lets the system choose
    rules: CoordinatorSettings
    model: str  # Hugging Face name or path, as servers are told it
    environments: Annotated[tuple[EnvironmentSpec, ...], Meta(min_length=1, max_length=MAX_ENVIRONMENTS)]
    prompts: str  # path.jsonl, hf:NAME[:CONFIG][:SPLIT] or python:module:function
    seed: Annotated[int, Meta(ge=0, lt=1 << 53)] = 0
    group_size: Annotated[int, Meta(ge=1, le=4096)]
    max_new_tokens: Annotated[int, Meta(ge=1, le=1 << 22)]
    temperature: Annotated[float, Meta(gt=0.0, le=100.0)] = 1.0
    evaluation: HeldOut | None = None
    relay_weights: RelayWeights = 0  # servers that each gives its weights on to
    keys: str = ""  # folder with the learner's key and the allow-list; needed unless `listen` is loopback
    lease_secret: Annotated[str, Meta(pattern="^[0-9a-f]{32,128}$")]  # known to the coordinators of one learner
    journal: str  # SQLite file of accepted groups; made if it is not there
    event_log: str = ""  # empty: none is written


def write_settings(settings: ServiceSettings, path: Path) -> None:
    """What `python -m learner.coordinator PATH` reads."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(settings), indent=2))


def read_settings(path: Path) -> ServiceSettings:
    """Raises UserError naming the file and what is wrong in it."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=ServiceSettings)
    except OSError as error:
        raise UserError(f"coordinator settings {path} cannot be read: {error.strerror}") from error
    except (msgspec.MsgspecError, ValueError) as error:
        raise UserError(f"coordinator settings {path}: {error}") from error
