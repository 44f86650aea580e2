"""Environments by URL: one file per kind, one line in the table.

Importing this package must stay cheap: reward workers do it at each start.
"""

from collections.abc import Callable

from common.environments import EnvironmentSettings
from rollout_server.environments.environment import Environment
from rollout_server.environments.python_function import PythonFunction

ENVIRONMENTS: dict[str, Callable[[str, EnvironmentSettings], Environment]] = {
    "python": PythonFunction,
}


def environment_at(url: str, settings: EnvironmentSettings | None = None) -> Environment:
    """The environment a URL names, not entered yet; raises ValueError for a URL that cannot be one."""
    scheme, separator, _ = url.partition(":")
    if not separator or scheme not in ENVIRONMENTS:
        raise ValueError(
            f"environment {url!r} has an unknown scheme; known: {', '.join(f'{known}:' for known in ENVIRONMENTS)} "
            f"(for example python:my_rewards:score)"
        )
    return ENVIRONMENTS[scheme](url, settings or EnvironmentSettings())
