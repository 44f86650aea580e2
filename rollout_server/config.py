"""RolloutServerConfig: every setting of a rollout server, as flags and as [rollout_server] keys of a TOML file."""

from dataclasses import dataclass
from pathlib import Path

from common.config import option
from rollout_server.nearest_snapshots import TransportName


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutServerConfig:
    """Sample trajectories with vLLM for a learner, and keep the weights at the version it publishes.

    Start it before or after the learner, on any node, as often as there are GPUs to fill. It may be killed at any
    moment: what it was sampling goes to the other servers.
    """

    learner: str = option(help="address the learner listens on, tcp://HOST:PORT, as the learner prints it")
    key: Path | None = option(None, help="key file that the learner wrote for this server; needed beyond loopback")
    name: str | None = option(None, help="name of this server in logs and metrics; default: host name and process id")
    model: str | None = option(None, help="where this node has the model, if not where the learner has it")

    max_sequences: int = option(256, help="sequences vLLM samples at once; more wait in its queue")
    max_groups: int = option(64, help="groups this server may be working on at once")
    tensor_parallel_size: int = option(1, help="GPUs (or CPU processes) that share one copy of the model")
    gpu_memory_utilization: float = option(0.9, help="share of GPU memory for weights and KV cache")
    kv_cache_gib: float | None = option(None, help="GiB of KV cache instead; default on a CPU: 0.25")
    cpu_threads: int = option(1, help="threads of the engine on a CPU; more help models from about 50M parameters up")
    max_adapters: int | None = option(
        None,
        help="versions of an adapter in use at once, at least 2, where the learner publishes adapters; with as many in "
        "use a newer one waits; default: as many as the run's staleness needs, at most 16",
    )
    keep_kv_cache: bool = option(
        False, help="keep the KV cache over weight updates: shorter pauses, tokens not exactly of one policy"
    )

    environment_workers: int | None = option(
        None, help="processes that run a python: environment on this node; default: as the run says, 1 if it does not"
    )
    environment_timeout_s: float | None = option(
        None, help="a call of an environment that takes longer fails its task; default: as the run says, or 30"
    )

    gateway_listen: str = option(
        "127.0.0.1:0", help="HOST:PORT of the OpenAI-compatible endpoint, when a run has agents; port 0: any free one"
    )
    gateway_url: str | None = option(
        None, help="http(s)://HOST:PORT by which agents reach it, if that is not the address it listens at"
    )
    gateway_key: Path | None = option(
        None, help="file with the key that agents show to be given a task; agent:pull needs one beyond loopback"
    )
    tool_parser: str = option(
        "hermes", help="how the model writes tool calls: the name of one of vLLM's parsers (hermes, qwen3_xml, ...)"
    )

    weights_from: TransportName = option(
        "nearest",
        help="how weights get here: shared_memory (only on the learner's host, as its user), zeromq (from everywhere), "
        "or the nearest that works",
    )

    relay_listen: str | None = option(
        None,
        help="tcp://HOST:PORT where other servers pull weights from this one, in a run with --relay-weights; empty: "
        "nowhere; default: a free port of the network that reaches the learner",
    )

    run_dir: Path = option(Path("runs/rollout-server"), help="where this server's event log goes")
    metrics_listen: str | None = option("127.0.0.1:0", help="address of the Prometheus endpoint; empty for none")

    def __post_init__(self) -> None:
        for name in ("max_sequences", "max_groups", "tensor_parallel_size", "cpu_threads", "environment_workers"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_adapters is not None and self.max_adapters < 2:
            raise ValueError(f"max_adapters must be at least 2, one in use and the next, got {self.max_adapters}")
        if not self.learner.startswith(("tcp://", "ipc://")):
            raise ValueError(f"learner must look like tcp://HOST:PORT, got {self.learner!r}; the learner prints it")
        if self.relay_listen and not self.relay_listen.startswith("tcp://"):
            raise ValueError(f"relay_listen must look like tcp://HOST:PORT, or be empty; got {self.relay_listen!r}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization}")
        if self.environment_timeout_s is not None and self.environment_timeout_s <= 0:
            raise ValueError(f"environment_timeout_s must be > 0, got {self.environment_timeout_s}")
