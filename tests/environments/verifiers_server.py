"""An environment server of verifiers. Runs where that is installed.

`python verifiers_server.py --port PORT [--workers N]`: of the tasks in verifiers_tasks.py.
"""

import argparse
import logging

from verifiers.v1.serve import serve_env
from verifiers.v1.utils.loaders import resolve_env_config

NAME = "verifiers_tasks"


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--port", type=int, required=True)
    arguments.add_argument("--workers", type=int, default=1)
    options = arguments.parse_args()
    logging.basicConfig(level=logging.WARNING)
    config = {"taskset": {"id": NAME}, "agent": {"harness": {"id": NAME}, "runtime": {"type": "subprocess"}}}
    serve_env(
        max_workers=options.workers,
        address=f"tcp://127.0.0.1:{options.port}",
        config=resolve_env_config(config),
    )


if __name__ == "__main__":
    main()
