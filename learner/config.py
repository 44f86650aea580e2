"""LearnerConfig: every setting of a run, as flags, as [learner] keys of a TOML file, and with their help."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.config import option
from common.environments import Environments
from learner.config_checks import check
from learner.coordinator.settings import StaleAction
from learner.engine_settings import (
    Attention,
    EngineSettings,
    Offload,
    SharePrompts,
    ZeroStage,
    read_deepspeed_file,
)
from learner.evaluation_settings import EvaluationSettings
from learner.lora_settings import LoraSettings, LoraSnapshots, lora_settings
from learner.loss_settings import (
    CriticKind,
    OnNonfinite,
    Proximal,
    default_adam_beta1,
)
from learner.reward_settings import KlSettings, RewardSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerConfig:
    """Train a language model by reinforcement learning on trajectories streamed by rollout servers.

    The learner starts the coordinator and the snapshot server, prints the command that joins a rollout server to the
    run, waits until one has joined, and trains. It checkpoints as it goes; started again with the same run directory,
    it resumes.
    """

    # What is learned
    model: str | None = option(None, help="policy to train: a Hugging Face name or directory; default: the demo model")
    data: str = option(
        "python:learner.demo.task:training_prompts",
        help="prompts: FILE.jsonl, hf:NAME[:SPLIT], or python:MODULE:GENERATOR; a row needs the key prompt. "
        "system:TEXT for an environment that makes its tasks itself",
    )
    environment: Environments = option(
        Environments.at("python:learner.demo.task:reward"),
        short="env",
        help="what answers and rewards the policy: python:MODULE:NAME, reward+http://HOST:PORT/PATH, "
        "hf-reward:MODEL or openenv+ws://HOST:PORT; in the file also a table for each of several: see "
        "docs/environments.md",
    )
    critic_model: str | None = option(
        None, help="network that a critic of its own starts from, for --advantage gae or vtrace; default: model"
    )

    # Adapters in place of the whole policy
    lora_rank: int = option(
        0,
        help="rank of the LoRA adapters that alone are trained; 0: the whole policy is. The reference "
        "that the policy is held near is then the policy without them, and takes no memory",
    )
    lora_alpha: float | None = option(None, help="adapters are scaled by alpha / rank; default: 2 * lora_rank")
    lora_target_modules: tuple[str, ...] = option(
        (), help="linear layers with an adapter, e.g. q_proj; may be repeated; default: all but the output layer"
    )
    lora_snapshots: LoraSnapshots = option(
        "adapter",
        help="what rollout servers are given: the adapter, beside a base model that they load once, or the whole "
        "policy with it added (merged), for engines without adapters",
    )
    lora_dropout: float = option(
        0.0,
        help="share of an adapter's inputs that are zeroed where a gradient is computed; servers sample without, "
        "so that it counts as being off-policy",
    )

    # How much
    total_steps: int = option(400, help="optimizer steps of the run")
    groups_per_step: int = option(16, help="groups (prompts) trained per optimizer step")
    group_size: int = option(16, help="trajectories sampled per prompt")
    max_staleness: int = option(
        2, help="oldest token that may be trained, in optimizer steps; 0 is synchronous PPO, more overlaps more"
    )
    stale_action: StaleAction = option(
        "wait",
        help="what is done about a slow group whose tokens would be too old at the next step: wait for it, requeue "
        "(give it up and begin again, twice at most), or mask (go on; its too old tokens get no gradient)",
    )
    max_new_tokens: int = option(256, help="longest completion, in tokens")
    max_model_len: int | None = option(
        None,
        help="longest prompt + completion; default: 2 * max_new_tokens + 1024, or what the model can",
    )
    temperature: float = option(1.0, help="sampling temperature, also of the log-probabilities trained on")
    seed: int = option(0, help="seed of data order, sampling and initialisation")

    # The algorithm; what can be chosen is listed below
    loss: str = option("decoupled_ppo", help="policy loss")
    loss_setting: dict[str, float] = option(dict, help="a setting of the loss, e.g. clip_ratio=0.1; may be repeated")
    correction: tuple[str, ...] = option(
        (),
        help="what is done about tokens that another policy sampled, e.g. icepop or icepop:low=0.5,high=2; may be "
        "repeated; default: taper with decoupled_ppo and reinforce, truncate_tokens where max_staleness is 0; nothing "
        "with the others",
    )
    proximal: Proximal = option(
        "recomputed",
        help="centre of decoupled_ppo's trust region: the policy before the step, or the one before that, interpolated "
        "between it and the policy that sampled a token by their versions",
    )
    aggregation: str = option("token_mean", help="what share in the loss each token has")
    entropy_coefficient: float = option(0.0, help="reward for one nat of entropy per token, in the loss; 0: none")
    value_clip: float = option(0.5, help="how far a value may move in a step before the critic's loss is clipped")
    critic: CriticKind = option(
        "own",
        help="for --advantage gae or vtrace: a network of its own, or a value head on the policy's trunk, which takes "
        "no memory worth naming and learns at the policy's learning rate",
    )
    value_coefficient: float = option(0.1, help="what the loss of a value head counts for beside the policy's")
    advantage: str = option(
        "grpo",
        help="advantages: grpo, dr_grpo, rloo, reinforce_plus_plus_baseline (all relative to the group), "
        "reinforce_plus_plus (relative to the batch), reinforce (plain returns), gae or vtrace (with a critic)",
    )
    advantage_setting: dict[str, float] = option(
        dict, help="a setting of the advantages, e.g. gae_lambda=0.95; may be repeated"
    )

    # Near a reference
    kl_coefficient: float = option(
        0.0, help="cost of one nat of distance per token from the reference model; 0: none, and no reference is loaded"
    )
    kl_in: Literal["loss", "reward"] = option(
        "loss",
        help="where that cost goes: loss (as in GRPO), or reward (as in RLHF; the policy makes one more forward pass)",
    )
    kl_estimator: Literal["k1", "k2", "k3"] | None = option(
        None, help="of the distance at a token; default: k1 in the reward, k3 in the loss; k1 belongs in the reward"
    )
    kl_target: float | None = option(
        None,
        help="nats per trajectory, e.g. 6: the coefficient starts at kl_coefficient and adapts to stay there; "
        "default: it stays as it is",
    )
    reference_model: str | None = option(
        None, help="what the policy is held near; with kl_coefficient 0 only measured against; default: model"
    )
    reference_offload: bool = option(False, help="keep the reference in host memory between its passes")

    # Rewards, in the order in which they are changed
    overlong_buffer: int = option(
        0, help="tokens before overlong_length in which a penalty for length grows from 0 (DAPO); 0: no penalty"
    )
    overlong_length: int | None = option(
        None, help="sampled tokens at which that penalty is complete; default: max_new_tokens"
    )
    overlong_penalty: float = option(1.0, help="the complete penalty, taken from the reward")
    reward_normalization: Literal["none", "batch", "running"] = option(
        "none", help="mean 0 and standard deviation 1, over each batch or over all rewards so far"
    )
    reward_clip: float | None = option(None, help="rewards are clipped to plus and minus this; default: not")
    dynamic_sampling: int = option(
        0,
        help="groups that may be filtered for an optimizer step because their rewards are all equal (DAPO): other "
        "tasks are sampled in their place; e.g. 4 * groups_per_step; then groups are taken as they come; 0: none",
    )
    drop_equal_groups: bool = option(
        False, help="groups of equal rewards, which have no gradient, do not count among the tokens either (DAPO)"
    )
    drop_truncated: bool = option(False, help="truncated trajectories are compared with but not trained on (DAPO)")

    # Evaluation, beside training: see docs/evaluation.md
    evaluate_every_steps: int = option(
        0,
        help="versions between two evaluations over held-out tasks; also the first and the last version are evaluated; "
        "0: never",
    )
    evaluation_data: str | None = option(
        None,
        help="held-out tasks, as for data; prompts in there are never trained. Default: they are taken out of data",
    )
    evaluation_tasks: int = option(64, help="held-out tasks of an evaluation")
    evaluation_samples: int = option(1, help="episodes of each held-out task; with more than 1 also pass@k is reported")
    evaluation_temperature: float | None = option(
        None, help="of their sampling; 0 is greedy; default: 0 with one sample, else temperature"
    )
    evaluation_pass_reward: float = option(1.0, help="an episode with at least this reward counts as passed in pass@k")
    evaluation_hold_s: float = option(
        30.0,
        help="for so long at most a rollout server may stay at the version that is evaluated once there is a newer one",
    )
    evaluation_timeout_s: float = option(
        600.0, help="an evaluation that is not done by then is given up; the run ends so much later at most"
    )

    # The optimizer
    learning_rate: float = option(1e-6, help="peak learning rate of the policy")
    critic_learning_rate: float = option(1e-5, help="peak learning rate of a critic of its own")
    critic_warmup_steps: int = option(
        0, help="first steps of the run in which the critic learns alone and the policy stays as it is"
    )
    lr_schedule: Literal["constant", "linear", "cosine"] = option(
        "constant", help="after the warm-up; one that falls takes out what staleness shakes: see docs/learning.md"
    )
    warmup_steps: int = option(0, help="steps in which the learning rate rises linearly from zero")
    adam_beta1: float | None = option(
        None,
        help="decay of Adam's first moment; default: 0.9 at max_staleness 0, and 0.1 less for each step of it, down "
        "to 0: stale gradients are momentum themselves",
    )
    adam_beta2: float = option(0.95, help="decay of Adam's second moment")
    adam_epsilon: float = option(1e-8, help="added to the root of the second moment; more tames tiny gradients")
    weight_decay: float = option(0.0, help="decoupled weight decay")
    max_grad_norm: float = option(1.0, help="gradients are clipped to this norm")
    on_nonfinite: OnNonfinite = option(
        "stop",
        help="when a loss or gradient is not finite, nothing is updated and the batch is kept in RUN_DIR/refused (read "
        "it with countercurrent batch); then the run stops, or the batch counts as trained (skip)",
    )
    max_skipped_steps: int = option(3, help="so many steps skipped in a row stop the run all the same")

    # The training engine
    zero_stage: ZeroStage = option(
        1, help="DeepSpeed ZeRO stage: what ranks share out; 1 the optimizer, 2 gradients too, 3 parameters too"
    )
    offload: Offload = option(
        "none",
        help="to host memory: optimizer (from stage 1 up), or all (parameters too, stage 3); its Adam is "
        "compiled at the first start",
    )
    dtype: Literal["float32", "bfloat16"] = option(
        "float32", help="parameters and activations; bfloat16 from stage 1 up"
    )
    micro_batch_tokens: int = option(
        16384,
        help="tokens per forward pass of a rank, padding included, a shared prompt once; less needs less memory",
    )
    packing: bool = option(
        True, help="several trajectories in a row, next to no padding; models that cannot are padded all the same"
    )
    share_prompts: SharePrompts = option(
        "auto",
        help="whether the prompt of a group is computed once or for each answer; auto: once, with packing and sdpa "
        "attention, where the model then says the same; two thirds of the time for answers as long as their prompt",
    )
    attention: Attention = option(
        "auto",
        help="how attention is computed; auto: flash_attention_2 where it is installed, on a GPU, in bfloat16, and "
        "elsewhere what transformers takes, which is sdpa for most models",
    )
    activation_checkpointing: bool = option(
        False, help="compute activations anew in the backward pass: a third slower, far less memory"
    )
    check_memory: bool = option(
        True, help="refuse to start when parameters, gradients and the optimizer's state cannot fit into memory"
    )
    deepspeed_config: Path | None = option(
        None, help="a JSON file of DeepSpeed's, merged with what the settings here say; a conflict is refused"
    )
    ranks: int = option(
        1,
        help="processes to train with on this machine, one per accelerator; elsewhere torchrun, deepspeed or srun say",
    )
    sequence_parallel: int = option(
        1,
        help="ranks that compute each sequence together (Ulysses), a stretch of its tokens and some of the attention "
        "heads each; a micro-batch then has so many times --micro-batch-tokens",
    )
    tensor_parallel: int = option(
        1,
        help="ranks that have a part of each layer each (AutoTP), for models whose layers are too large for one; at "
        "zero_stage 1 or 2",
    )
    max_restarts: int = option(3, help="how often in a row --ranks starts ranks anew that get no step further")
    rank_timeout_s: float = option(600.0, help="a rank whose node vanished is given up after so long")

    # Where
    run_dir: Path = option(Path("runs/default"), help="checkpoints, logs, keys and metrics; an existing run is resumed")
    listen: str = option(
        "tcp://127.0.0.1:0",
        help="address for rollout servers; port 0 takes a free one, tcp://0.0.0.0:5557 all networks",
    )
    weights_listen: str | None = option(None, help="address weights are pulled from; default: as listen, another port")
    relay_weights: int = option(
        0,
        help="how many rollout servers each one gives its weights on to, and the learner itself serves: with 32, 1,000 "
        "servers cost its uplink what 32 do; worth it from about 64 servers, which must reach each other; 0: the "
        "learner serves all",
    )
    advertise_host: str | None = option(None, help="host name printed for other nodes when listening on all networks")

    # Whether rollout servers compute with what was published
    canary_every: int | None = option(
        None,
        help="every so many versions, servers hold the log-probabilities of a fixed prompt against the learner's; 0: "
        "never; default: 1, and 10 from 2B parameters up",
    )
    canary_tolerance: float | None = option(
        None,
        help="mean difference in nats per token above which a server is taken out; default: 0.0002 for float32, 0.25 "
        "for bfloat16",
    )

    # Bounds
    queue_bytes: int = option(1 << 30, help="bytes of trajectories that may be leased, queued or in training at once")
    queue_groups: int | None = option(None, help="groups likewise; default: (max_staleness + 2) * groups_per_step")
    server_timeout_s: float = option(10.0, help="a rollout server silent for so long loses its leases to others")
    max_attempts: int = option(3, help="a task that failed so often is parked and named")

    # Checkpoints and what is seen of the run
    checkpoint_every_steps: int = option(50, help="a checkpoint also follows the last step and an interruption")
    keep_checkpoints: int = option(2, help="older checkpoints are deleted")
    metrics_listen: str | None = option("127.0.0.1:0", help="address of the Prometheus endpoint; empty for none")
    tensorboard: bool = option(True, help="write TensorBoard logs into the run directory")
    wandb_project: str | None = option(None, help="also log to this Weights & Biases project")

    def __post_init__(self) -> None:
        check(self)

    @property
    def adam_betas(self) -> tuple[float, float]:
        beta1 = default_adam_beta1(self.max_staleness) if self.adam_beta1 is None else self.adam_beta1
        return beta1, self.adam_beta2

    @property
    def reward_settings(self) -> RewardSettings:
        length = self.overlong_length
        if length is None and self.overlong_buffer > 0:
            length = self.max_new_tokens
        return RewardSettings(
            overlong_buffer=self.overlong_buffer,
            overlong_length=length,
            overlong_penalty=self.overlong_penalty,
            normalization=self.reward_normalization,
            clip=self.reward_clip,
            drop_equal_groups=self.drop_equal_groups,
            drop_truncated=self.drop_truncated,
        )

    @property
    def engine_settings(self) -> EngineSettings:
        return EngineSettings(
            offload=self.offload,
            activation_checkpointing=self.activation_checkpointing,
            packing=self.packing,
            share_prompts=self.share_prompts,
            rank_timeout_s=self.rank_timeout_s,
            attention=self.attention,
            check_memory=self.check_memory,
            sequence_parallel=self.sequence_parallel,
            tensor_parallel=self.tensor_parallel,
            deepspeed=read_deepspeed_file(self.deepspeed_config),
            deepspeed_file=str(self.deepspeed_config or ""),
        )

    @property
    def lora_settings(self) -> LoraSettings | None:
        return lora_settings(
            rank=self.lora_rank,
            alpha=self.lora_alpha,
            target_modules=self.lora_target_modules,
            dropout=self.lora_dropout,
        )

    @property
    def evaluation_settings(self) -> EvaluationSettings | None:
        """None when nothing is evaluated."""
        if self.evaluate_every_steps == 0:
            return None
        temperature = self.evaluation_temperature
        if temperature is None:
            temperature = 0.0 if self.evaluation_samples == 1 else self.temperature
        return EvaluationSettings(
            every_steps=self.evaluate_every_steps,
            data=self.evaluation_data or "",
            tasks=self.evaluation_tasks,
            samples=self.evaluation_samples,
            temperature=temperature,
            pass_reward=self.evaluation_pass_reward,
            hold_s=self.evaluation_hold_s,
            timeout_s=self.evaluation_timeout_s,
        )

    def kl_settings(self, model: str) -> KlSettings:
        """For a run that trains `model`."""
        return KlSettings(
            coefficient=self.kl_coefficient,
            place=self.kl_in,
            estimator=self.kl_estimator,
            target=self.kl_target,
            reference_model=self.reference_model or (model if self.kl_coefficient else None),
            reference_offload=self.reference_offload,
        )

    @property
    def queue_capacity(self) -> int:
        """Groups that may be leased, queued or in training at once."""
        return self.queue_groups or (self.max_staleness + 2) * self.groups_per_step

    @property
    def max_group_bytes(self) -> int:
        """Largest group: 13 bytes a token (id, log-probability, version, mask), and what describes each trajectory."""
        return self.group_size * (13 * self.longest_trajectory + 1024)

    @property
    def longest_trajectory(self) -> int:
        """Tokens of prompt and completion together that memory is set aside for."""
        return self.max_model_len or 2 * self.max_new_tokens + 1024
