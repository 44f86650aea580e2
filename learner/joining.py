"""How rollout servers find the run: addresses, the key file, and the command that a person can paste."""

import shlex
import socket

from common.lifecycle import UserError
from common.wire import is_local
from learner.config import LearnerConfig
from learner.run_directory import RunDirectory

KEY_NAME = "rollout-server"

_ALL_NETWORKS = ("*", "0.0.0.0")


def listen_address(config: LearnerConfig, run: RunDirectory) -> str:
    """As configured; a free port, once taken, is taken again by the resumed run, so that servers find it there."""
    remembered = run.remembered_address()
    host, _, port = config.listen.rpartition(":")
    if port in ("0", "*") and remembered is not None and _can_bind(remembered):
        return f"{host}:{remembered.rpartition(':')[2]}"
    return config.listen


def weights_address(config: LearnerConfig) -> str:
    """Where snapshots are served: as configured, else on the same network at a free port."""
    if config.weights_listen is not None:
        return config.weights_listen
    if config.listen.startswith("ipc://"):
        return config.listen + "-weights"
    return f"{config.listen.rpartition(':')[0]}:0"


def needs_keys(config: LearnerConfig) -> bool:
    """Whether somebody on another machine could connect."""
    return not (is_local(config.listen) and is_local(weights_address(config)))


def join_command(config: LearnerConfig, run: RunDirectory, address: str) -> str:
    """What to run, on whatever node, to add a rollout server to the run."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    if host in _ALL_NETWORKS:
        address = f"tcp://{config.advertise_host or _host_name()}:{port}"
    words = ["rollout-server", "--learner", address]
    if needs_keys(config):
        words += ["--key", str(run.keys / f"{KEY_NAME}.key")]
    return shlex.join(words)


def checked_model_len(config: LearnerConfig, model_max_len: int) -> int:
    """Longest prompt and completion together; raises UserError when the model cannot do what is asked."""
    max_model_len = config.max_model_len or min(model_max_len, config.longest_trajectory)
    if max_model_len > model_max_len:
        raise UserError(f"max_model_len {max_model_len} is more than the {model_max_len} tokens the model can do")
    if config.max_new_tokens >= max_model_len:
        raise UserError(
            f"max_new_tokens {config.max_new_tokens} leaves no room for a prompt within {max_model_len} tokens"
        )
    return max_model_len


def _can_bind(address: str) -> bool:
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except OSError:
            return False
    return True


def _host_name() -> str:
    """A name of this machine that others can probably resolve; --advertise-host is for when they cannot."""
    return socket.getfqdn()
