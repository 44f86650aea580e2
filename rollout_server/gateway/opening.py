"""Whether a rollout server has a gateway, and how it is opened."""

from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

from common.lifecycle import UserError
from common.wire.addresses import is_local
from rollout_server.config import RolloutServerConfig
from rollout_server.environments.agent_pull import AgentPull
from rollout_server.environments.environment import AgentEnvironment, Environment
from rollout_server.gateway.gateway import GatewaySettings

MIN_KEY_CHARS = 16


def gateway_settings(
    config: RolloutServerConfig, environments: Iterable[Environment | AgentEnvironment]
) -> GatewaySettings | None:
    """None when no environment of the run has agents; raises UserError for settings that cannot be used."""
    agents = [environment for environment in environments if isinstance(environment, AgentEnvironment)]
    if not agents:
        return None
    key = _read_key(config.gateway_key) if config.gateway_key is not None else None
    if key is None and any(isinstance(agent, AgentPull) for agent in agents) and not _is_local(config):
        raise UserError(
            f"agents beyond this host must show a key to be given a task, and --gateway-listen is "
            f"{config.gateway_listen}: write a key into a file and name it with --gateway-key"
        )
    return GatewaySettings(listen=config.gateway_listen, url=_url(config.gateway_url), agent_key=key)


def _is_local(config: RolloutServerConfig) -> bool:
    return config.gateway_url is None and is_local(f"tcp://{config.gateway_listen}")


def _url(url: str | None) -> str | None:
    if url is None:
        return None
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
        raise UserError(f"--gateway-url must look like http://HOST:PORT, got {url!r}")
    return url.rstrip("/")


def _read_key(path: Path) -> str:
    try:
        key = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--gateway-key {path} cannot be read: {error}") from error
    if len(key) < MIN_KEY_CHARS or not key.isascii() or any(one.isspace() for one in key):
        raise UserError(f"--gateway-key {path} must hold one word of at least {MIN_KEY_CHARS} ASCII characters")
    return key
