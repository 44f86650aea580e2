"""`python -m tests.storm.server_process FLAGS`: the rollout-server command with the table engine in place of vLLM."""

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NoReturn

from common.lifecycle import configure_logging, leave, run_until_stopped
from common.messages import Welcome
from rollout_server.__main__ import parse_rollout_server, serve
from rollout_server.config import RolloutServerConfig
from rollout_server.table_engine import TableEngine
from rollout_server.tokenizer import load_tokenizer, model_config

STEP_S = float(os.environ.get("STORM_TOKEN_S", "0.004"))


@asynccontextmanager
async def open_table_engine(model: str, welcome: Welcome, config: RolloutServerConfig) -> AsyncIterator[TableEngine]:
    del config
    vocab_size = model_config(model)["vocab_size"]
    engine = TableEngine(
        vocab_size=vocab_size,
        max_model_len=welcome.max_model_len,
        eos_id=load_tokenizer(model).eos_token_id,
        step_s=STEP_S,
    )
    try:
        yield engine
    finally:
        await engine.close()


def main() -> NoReturn:
    config = parse_rollout_server(sys.argv[1:])
    configure_logging("rollout-server")
    leave(run_until_stopped(lambda: serve(config, open_engine=open_table_engine)))


if __name__ == "__main__":
    main()
