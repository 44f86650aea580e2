"""The rollout-server command: join a learner, start an engine, sample until the run is finished."""

import asyncio
import logging
import os
import secrets
import socket
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import NoReturn

import msgspec

from common import messages
from common.config import parse
from common.events import EventLog
from common.fingerprint import fingerprint_model_config, fingerprint_tokenizer
from common.keys import load_client_key
from common.lifecycle import UserError, configure_logging, leave, run_until_stopped
from common.metrics import start_metrics_server
from common.wire import open_dealer
from rollout_server.busy import MeteredEngine
from rollout_server.config import RolloutServerConfig
from rollout_server.environments import environment_at
from rollout_server.environments.environment import AgentEnvironment, Environment
from rollout_server.episodes import EpisodeRunner
from rollout_server.gateway.gateway import Gateway
from rollout_server.gateway.opening import gateway_settings
from rollout_server.greeting import RunFinishedError, join
from rollout_server.inference import InferenceEngine
from rollout_server.nearest_snapshots import TRANSPORTS
from rollout_server.reached_addresses import own_address_towards, with_host_of
from rollout_server.relay import Relaying, open_relay
from rollout_server.server import RolloutServer
from rollout_server.tokenizer import Tokenizer, load_tokenizer, model_config
from rollout_server.vllm_engine import open_vllm_engine
from rollout_server.vllm_start import AdapterSlots, VllmSettings
from rollout_server.vllm_tools import VllmTools
from rollout_server.weight_receiver import WeightReceiver

logger = logging.getLogger(__name__)

KNOWN_TABLES = ("learner", "rollout_server")
MAX_FRAME_BYTES = 64 << 20

EXAMPLES = """\
examples:
  rollout-server --learner tcp://127.0.0.1:5557
  rollout-server --learner tcp://10.0.0.1:5557 --key rollout-server.key --max-sequences 512

The learner prints the exact command. Weights come from the learner; this node needs the model's config and tokenizer.
"""


EngineOpener = Callable[[str, messages.Welcome, RolloutServerConfig], AbstractAsyncContextManager[InferenceEngine]]
"""Opens the engine that samples: from the model's place on this node, what the learner said, and the configuration."""


def main(argv: list[str] | None = None) -> NoReturn:
    config = parse_rollout_server(sys.argv[1:] if argv is None else argv)
    configure_logging("rollout-server")
    leave(run_until_stopped(lambda: serve(config)))


def parse_rollout_server(argv: list[str]) -> RolloutServerConfig:
    return parse(
        RolloutServerConfig,
        argv,
        program="rollout-server",
        table="rollout_server",
        known_tables=KNOWN_TABLES,
        epilog=EXAMPLES,
    )


async def serve(config: RolloutServerConfig, *, open_engine: EngineOpener | None = None) -> int:
    """Sample until the run is finished; open_engine: what samples, in place of vLLM."""
    name = config.name or f"{socket.gethostname()}-{os.getpid()}"
    key = load_client_key(config.key) if config.key is not None else None
    hello = messages.Hello(protocol=messages.PROTOCOL_VERSION, server=name, epoch=secrets.token_hex(8))
    async with AsyncExitStack() as stack:
        events = EventLog(config.run_dir / f"events-{name}.jsonl", "rollout_server")
        stack.callback(events.close)
        dealer = await stack.enter_async_context(open_dealer(config.learner, key=key, max_frame_bytes=MAX_FRAME_BYTES))
        try:
            welcome = await join(dealer, hello)
        except RunFinishedError as finished:
            logger.info("%s", finished)
            return 0
        model = config.model or welcome.model
        tokenizer, ready = prepare(model, welcome, config)
        environments = environments_of(welcome, config)
        gateway = None
        if (settings := gateway_settings(config, environments.values())) is not None:
            gateway = await stack.enter_async_context(Gateway(settings))
            logger.info("agents reach the policy at %s/v1", gateway.address)
        for environment in environments.values():
            await stack.enter_async_context(environment)
        logger.info("starting the engine for %s", model)
        opened = await stack.enter_async_context((open_engine or open_default_engine)(model, welcome, config))
        if gateway is not None and open_engine is None:
            gateway.tools = await asyncio.to_thread(VllmTools, config.tool_parser, tokenizer)
        engine = MeteredEngine(opened, events)
        relaying = Relaying(key)
        if welcome.relay_weights and config.relay_listen != "":
            own_address = own_address_towards(config.learner)
            await stack.enter_async_context(open_relay(relaying, config.relay_listen or own_address))
            relaying.address = with_host_of(own_address, relaying.address)
        receiver = WeightReceiver(engine, events, transport=TRANSPORTS[config.weights_from], relaying=relaying)
        stack.callback(receiver.close)
        server = RolloutServer(
            dealer=dealer,
            key=key,
            engine=engine,
            receiver=receiver,
            runner=lambda welcome: episode_runner(welcome, engine, environments, tokenizer, receiver, gateway),
            hello=hello,
            ready=ready,
            events=events,
        )
        if config.metrics_listen is not None:
            stack.enter_context(start_metrics_server(config.metrics_listen, server.metrics))
        await server.run(welcome)
    return 0


def prepare(model: str, welcome: messages.Welcome, config: RolloutServerConfig) -> tuple[Tokenizer, messages.Ready]:
    """The tokenizer, and what this server says of itself; UserError when it is not what the learner trains."""
    try:
        tokenizer = load_tokenizer(model)
        fingerprint = fingerprint_model_config(model_config(model))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {model}; --model says where this node has {welcome.model}: {error}") from error
    ready = messages.Ready(
        model_fingerprint=fingerprint,
        tokenizer_fingerprint=fingerprint_tokenizer(tokenizer),
        capacity_groups=config.max_groups,
        capacity_bytes=1 << 40,
    )
    if ready.model_fingerprint != welcome.model_fingerprint:
        raise UserError(
            f"{model} is not the architecture the learner trains ({welcome.model}); give the same with --model"
        )
    if ready.tokenizer_fingerprint != welcome.tokenizer_fingerprint:
        raise UserError(f"{model} has another tokenizer or chat template than the learner's {welcome.model}")
    return tokenizer, ready


def environments_of(
    welcome: messages.Welcome, config: RolloutServerConfig
) -> dict[str, Environment | AgentEnvironment]:
    """By name, not entered yet; UserError when this server has no environment of such a kind."""
    here = {"step_timeout_s": config.environment_timeout_s, "workers": config.environment_workers}
    given = {name: value for name, value in here.items() if value is not None}
    try:
        return {
            spec.name: environment_at(spec.url, msgspec.structs.replace(spec, **given)) for spec in welcome.environments
        }
    except ValueError as error:
        raise UserError(str(error)) from error


def open_default_engine(
    model: str, welcome: messages.Welcome, config: RolloutServerConfig
) -> AbstractAsyncContextManager[InferenceEngine]:
    kv_cache_bytes = int(config.kv_cache_gib * (1 << 30)) if config.kv_cache_gib is not None else None
    return open_vllm_engine(
        VllmSettings(
            model=model,
            dtype=welcome.dtype,
            max_model_len=welcome.max_model_len,
            max_num_seqs=config.max_sequences,
            kv_cache_bytes=kv_cache_bytes,
            gpu_memory_utilization=config.gpu_memory_utilization,
            tensor_parallel_size=config.tensor_parallel_size,
            cpu_threads=config.cpu_threads,
            clear_cache=not config.keep_kv_cache,
            adapters=adapter_slots(welcome.adapters, config),
        )
    )


def adapter_slots(needs: messages.AdapterNeeds | None, config: RolloutServerConfig) -> AdapterSlots | None:
    """What the engine is started with; None where the learner publishes the whole policy."""
    if needs is None:
        return None
    versions = needs.versions if config.max_adapters is None else config.max_adapters
    return AdapterSlots(rank=needs.rank, target_modules=needs.target_modules, versions=versions)


def episode_runner(
    welcome: messages.Welcome,
    engine: InferenceEngine,
    environments: dict[str, Environment | AgentEnvironment],
    tokenizer: Tokenizer,
    receiver: WeightReceiver,
    gateway: Gateway | None,
) -> EpisodeRunner:
    return EpisodeRunner(
        engine,
        environments,
        tokenizer,
        temperature=welcome.temperature,
        max_new_tokens=welcome.max_new_tokens,
        max_model_len=welcome.max_model_len,
        wait_for_version=receiver.wait_for_version,
        gateway=gateway,
    )


if __name__ == "__main__":
    main()
