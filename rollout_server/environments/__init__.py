"""Environments by URL: one file per kind, one line in the table.

Importing this package must stay cheap: reward workers do it at each start.
"""

import importlib
from typing import cast

from common.environments import EnvironmentSettings
from rollout_server.environments.environment import AgentEnvironment, Environment

ENVIRONMENTS = {
    "python": "python_code:PythonCode",
    "hf-reward": "hf_reward:HfReward",
    "reward+http": "reward_http:RewardHttp",
    "reward+https": "reward_http:RewardHttp",
    "openenv+ws": "openenv:OpenEnv",
    "openenv+wss": "openenv:OpenEnv",
    "nemo-gym+http": "nemo_gym:NemoGym",
    "nemo-gym+https": "nemo_gym:NemoGym",
    "agent+http": "agent_http:AgentHttp",
    "agent+https": "agent_http:AgentHttp",
    "agent": "agent_pull:AgentPull",
    "verifiers+tcp": "verifiers_tcp:VerifiersTcp",
}
"""Scheme -> module of this package and class, imported only when a run has such an environment."""


def environment_at(url: str, settings: EnvironmentSettings | None = None) -> Environment | AgentEnvironment:
    """The environment a URL names, not entered yet; raises ValueError for a URL that cannot be one."""
    scheme, separator, _ = url.partition(":")
    if not separator or scheme not in ENVIRONMENTS:
        raise ValueError(
            f"environment {url!r} has an unknown scheme; known: {', '.join(f'{known}:' for known in ENVIRONMENTS)} "
            f"(for example python:my_rewards:score)"
        )
    module, _, name = ENVIRONMENTS[scheme].partition(":")
    kind = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    return cast(Environment | AgentEnvironment, kind(url, settings or EnvironmentSettings()))
