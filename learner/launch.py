"""Where this process stands among the ranks, by whatever launcher started it."""

import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from common.lifecycle import UserError

SLURM_FIRST_PORT = 20000  # the port of a job follows from its number, so that jobs on one node do not meet
SLURM_NUM_PORTS = 20000


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One of num_ranks processes, which meet at rank 0's address."""

    rank: int
    num_ranks: int
    local_rank: int  # on its node: which accelerator it takes
    address: str
    port: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.num_ranks:
            raise UserError(f"rank {self.rank} of {self.num_ranks} ranks; ranks count from 0")

    def environment(self) -> dict[str, str]:
        """As torch and DeepSpeed want to be told."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.num_ranks),
            "LOCAL_RANK": str(self.local_rank),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def launched_place(environ: Mapping[str, str]) -> Place | None:
    """As torchrun, the deepspeed launcher, srun or `learner --ranks` said; None when nobody did.

    Raises UserError when only half of it was said.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environ]
        if missing:
            raise UserError(f"RANK is {environ['RANK']}, but {' and '.join(missing)} do not say where rank 0 is")
        return Place(
            rank=int(environ["RANK"]),
            num_ranks=int(environ["WORLD_SIZE"]),
            local_rank=int(environ.get("LOCAL_RANK", "0")),
            address=environ["MASTER_ADDR"],
            port=int(environ["MASTER_PORT"]),
        )
    # Only srun sets a step's number of tasks: a shell within an allocation is not a rank.
    if int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return Place(
            rank=int(environ["SLURM_PROCID"]),
            num_ranks=int(environ["SLURM_STEP_NUM_TASKS"]),
            local_rank=int(environ["SLURM_LOCALID"]),
            address=environ.get("MASTER_ADDR") or first_host(environ["SLURM_STEP_NODELIST"]),
            port=int(environ.get("MASTER_PORT") or SLURM_FIRST_PORT + int(environ["SLURM_JOB_ID"]) % SLURM_NUM_PORTS),
        )
    return None


def ranks_here(environ: Mapping[str, str], place: Place) -> int:
    """How many of the ranks are on this node, as the launcher said; 1 where it did not."""
    if place.address == "127.0.0.1":
        return place.num_ranks
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE"):  # torchrun, deepspeed, srun: 8(x2)
        if (match := re.match(r"\d+", environ.get(name, ""))) is not None:
            return int(match[0])
    return 1


def without_local_rank(words: Sequence[str]) -> list[str]:
    """The deepspeed launcher adds what it says in the environment as well."""
    return [word for word in words if not re.fullmatch(r"--local[_-]rank=\d+", word)]


def first_host(node_list: str) -> str:
    """Of Slurm's notation, such as gpu[007-009,012],login1."""
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,]*))?", node_list)
    if match is None:
        raise UserError(f"SLURM_STEP_NODELIST names no host: {node_list!r}; set MASTER_ADDR to that of rank 0")
    name, number, rest = match.groups(default="")
    return name + number + rest


def free_port() -> int:
    """One that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
