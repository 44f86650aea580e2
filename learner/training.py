"""TrainEngine: what the learner's loop needs of an engine, and the values that cross that line."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from torch import Tensor

from learner.engine_settings import EngineSettings, ZeroStage
from learner.lora_settings import LoraSettings, LoraSnapshots
from learner.loss_settings import (
    WITH_CRITIC,
    OnNonfinite,
    Proximal,
    check_critic_warmup,
    check_proximal,
    check_value_head,
)
from learner.reward_settings import KlSettings, RewardSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """What the training engines depend on."""

    model: str  # Hugging Face name or directory
    critic_model: str | None = None  # None: no critic of its own
    value_head: bool = False  # on the policy's trunk: the critic
    lora: LoraSettings | None = None  # None: the whole policy is trained
    lora_snapshots: LoraSnapshots = "adapter"
    dtype: Literal["float32", "bfloat16"] = "float32"
    zero_stage: ZeroStage = 1
    engine: EngineSettings = field(default_factory=EngineSettings)
    learning_rate: float = 1e-6
    critic_learning_rate: float = 1e-5
    critic_warmup_steps: int = 0  # first steps of the run in which the policy stays as it is
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    total_steps: int = 1
    adam_betas: tuple[float, float] = (0.9, 0.95)
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    on_nonfinite: OnNonfinite = "stop"
    micro_batch_tokens: int = 16384  # per forward pass, padding included
    temperature: float = 1.0
    max_staleness: int = 0
    loss: str = "decoupled_ppo"
    loss_settings: Mapping[str, float] = field(default_factory=dict)
    corrections: Sequence[str] | None = None  # such as "icepop:low=0.5,high=2", in this order; None: as suits the loss
    proximal: Proximal = "recomputed"
    aggregation: str = "token_mean"
    entropy_coefficient: float = 0.0
    value_clip: float = 0.5
    value_coefficient: float = 0.1  # of a value head's loss beside the policy's
    max_new_tokens: int = 256  # of a trajectory
    advantage: str = "grpo"
    advantage_settings: Mapping[str, float] = field(default_factory=dict)
    rewards: RewardSettings = field(default_factory=RewardSettings)
    kl: KlSettings = field(default_factory=KlSettings)
    seed: int = 0

    @property
    def publishes_adapters(self) -> bool:
        return self.lora is not None and self.lora_snapshots == "adapter"

    def __post_init__(self) -> None:
        if self.value_head:
            check_value_head(self.critic_model, self.critic_warmup_steps, self.advantage)
        elif (self.critic_model is not None) != (self.advantage in WITH_CRITIC):
            raise ValueError(
                f"advantage {self.advantage} and critic_model {self.critic_model}: {' and '.join(WITH_CRITIC)} need "
                "one, the others none"
            )
        check_critic_warmup(self.critic_warmup_steps, self.advantage)
        check_proximal(self.proximal, self.loss)
        self.rewards.check_advantage(self.advantage)
        self.engine.check_stage(self.zero_stage)
        if self.lora is not None and self.engine.tensor_parallel > 1:
            raise ValueError(f"tensor_parallel must be 1 with adapters, got {self.engine.tensor_parallel}")
        if self.dtype == "bfloat16" and self.zero_stage == 0:
            raise ValueError(
                "dtype bfloat16 needs zero_stage 1, 2 or 3; at stage 0 DeepSpeed's Adam counts a step too many"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLayout:
    """How a batch has to be cut for an engine."""

    num_parts: int = 1  # each for ranks of its own
    ranks_per_part: int = 1  # which compute it together
    ranks_per_sequence: int = 1  # of these, that have some of its tokens each, and so take more at once
    packs: bool = False  # see learner/packing.py
    in_one_row: bool = False  # likewise
    shares_prompts: bool = False  # see learner/segments.py


ALONE_AND_PADDED = BatchLayout()


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Trajectories that go through the network together, padded at the end. B = trajectories, T = tokens."""

    token_ids_BT: Tensor  # int64
    attention_mask_BT: Tensor  # bool; False on padding
    loss_mask_BT: Tensor  # bool; True on tokens that contribute to the gradient
    behavior_logprobs_BT: Tensor  # float32
    staleness_BT: Tensor  # int32; optimizer steps
    trajectory_index_B: Tensor  # int64; place in the batch


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBatch:
    """What one optimizer step trains on. N = trajectories."""

    micro_batches: Sequence[MicroBatch]
    rewards_N: Tensor  # float32
    lengths_N: Tensor  # int64; sampled tokens
    terminated_N: Tensor  # bool; False: truncated
    group_index_N: Tensor  # int64
    loss_tokens_N: Tensor  # int64; of each trajectory, tokens that contribute to the gradient
    num_loss_tokens: int  # their sum, which losses are divided by
    num_over_stale_tokens: int  # sampled, but too old to contribute: masked


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one optimizer step did. `refusal` says why it was not taken; all but the version is then as before."""

    metrics: Mapping[str, float]
    refusal: str | None = None


WriteState = Callable[[Path], None]


class TrainEngine(Protocol):
    """Holds the parameters. Blocking; all calls from one thread."""

    @property
    def version(self) -> int:
        """The policy version: number of completed optimizer steps."""
        ...

    @property
    def layout(self) -> BatchLayout:
        """How build_batch() is to cut batches for step()."""
        ...

    def step(self, batch: TrainBatch) -> StepResult:
        """One optimizer step; the version grows by one.

        Where the result says that it was not taken, nothing moved and the next batch may follow; the version has grown
        all the same if settings.on_nonfinite is skip: the batch has had its turn.
        """
        ...

    def snapshot_tensors(self) -> Iterable[tuple[str, Tensor]]:
        """The policy's parameters by Hugging Face name, tied ones once, in the dtype they are trained in.

        Adapters are added to the parameters they stand beside; where settings.publishes_adapters they are all there is.
        """
        ...

    def base_model_tensors(self) -> Iterable[tuple[str, Tensor]]:
        """What adapters stand beside, by Hugging Face name. To be asked for only where settings.publishes_adapters."""
        ...

    def token_logprobs(self, token_ids_T: np.ndarray) -> np.ndarray:
        """log pi of tokens 1..T-1 of token_ids_T given those before, at temperature 1: [T-1] float32.

        Changes nothing: neither gradients nor random state.
        """
        ...

    def copy_state(self) -> WriteState:
        """All that a bit-identical resume needs: parameters, optimizer, schedule, RNG, version. Costs a copy of it.

        Returns what writes the copy into a directory, on any thread, while training goes on.
        """
        ...

    def load(self, directory: Path) -> None:
        """Continue from what copy_state() wrote; raises UserError when it does not fit."""
        ...

    def export_huggingface(self, directory: Path) -> None:
        """Write the policy as a directory that transformers and vLLM load; adapters merged, and also on their own."""
        ...
