"""EngineSettings: how the training engine uses the machine. None of it changes what is learned, but for rounding."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

Offload = Literal["none", "optimizer", "all"]
ZeroStage = Literal[0, 1, 2, 3]
Attention = Literal["auto", "sdpa", "flash_attention_2", "eager"]
SharePrompts = Literal["auto", "never"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    offload: Offload = "none"  # to host memory: the optimizer's state, or the parameters too
    activation_checkpointing: bool = False
    packing: bool = True  # where the model allows it, see learner/packing.py
    share_prompts: SharePrompts = "auto"  # likewise, see learner/segments.py
    rank_timeout_s: float = 600.0
    attention: Attention = "auto"
    check_memory: bool = True  # refuse what cannot fit
    sequence_parallel: int = 1  # ranks that each compute a stretch of the same sequences
    tensor_parallel: int = 1  # ranks that each have a part of the same layers
    deepspeed: Mapping[str, Any] = field(default_factory=dict)  # a user's own configuration
    deepspeed_file: str = ""  # where it was read

    def __post_init__(self) -> None:
        if not 0 < self.rank_timeout_s < float("inf"):
            raise ValueError(f"rank_timeout_s must be finite and > 0, got {self.rank_timeout_s}")
        for name in ("sequence_parallel", "tensor_parallel"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.sequence_parallel > 1 and self.tensor_parallel > 1:
            raise ValueError(
                f"sequence_parallel {self.sequence_parallel} and tensor_parallel {self.tensor_parallel} do not go "
                "together: leave one of them at 1"
            )

    @property
    def ranks_per_part(self) -> int:
        """That compute the same part of a batch together."""
        return self.sequence_parallel * self.tensor_parallel

    @property
    def parallel_flag(self) -> str:
        """What makes ranks compute together, as it was set."""
        if self.tensor_parallel > 1:
            return f"--tensor-parallel {self.tensor_parallel}"
        return f"--sequence-parallel {self.sequence_parallel}"

    def check_stage(self, stage: ZeroStage) -> None:
        """Raises ValueError for what DeepSpeed cannot do at this stage."""
        if self.offload == "optimizer" and stage == 0:
            raise ValueError("offload optimizer needs zero_stage 1, 2 or 3, got 0")
        if self.offload == "all" and stage != 3:
            raise ValueError(f"offload all moves parameters too, which needs zero_stage 3, got {stage}")
        if self.tensor_parallel > 1 and stage not in (1, 2):
            raise ValueError(f"tensor_parallel {self.tensor_parallel} needs zero_stage 1 or 2, got {stage}")
        if self.tensor_parallel > 1 and self.offload != "none":
            raise ValueError(f"tensor_parallel {self.tensor_parallel} needs offload none, got {self.offload}")


def read_deepspeed_file(path: Path | None) -> Mapping[str, Any]:
    """Raises ValueError when the file is not a JSON object."""
    if path is None:
        return {}
    try:
        content = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.MsgspecError) as error:
        raise ValueError(f"--deepspeed-config {path} cannot be read: {error}") from error
    return content
