"""One of the resources servers that come with nemo-gym. Runs where that is installed.

`python nemo_gym_server.py --port PORT blackjack:BlackjackEnv`: without its launcher, which needs a Ray cluster.
"""

import argparse
import importlib

import uvicorn
from nemo_gym.config_types import BaseServerConfig
from nemo_gym.server_utils import ServerClient
from omegaconf import OmegaConf

arguments = argparse.ArgumentParser()
arguments.add_argument("--port", type=int, required=True)
arguments.add_argument("server", help="folder of resources_servers, and the class in its app.py")
options = arguments.parse_args()
name, _, kind_name = options.server.partition(":")

kind = getattr(importlib.import_module(f"resources_servers.{name}.app"), kind_name)
config_kind = kind.model_fields["config"].annotation
config = config_kind(host="127.0.0.1", port=options.port, entrypoint="app.py", name=name, domain="other")
client = ServerClient(
    head_server_config=BaseServerConfig(host="127.0.0.1", port=options.port), global_config_dict=OmegaConf.create()
)
server = kind(config=config, server_client=client)

if __name__ == "__main__":
    uvicorn.run(
        server.setup_webserver(), host="127.0.0.1", port=options.port, log_level="warning", timeout_keep_alive=30
    )
