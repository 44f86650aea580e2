"""What a LearnerConfig must be like, beyond its types."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from common.messages import MAX_GROUP_SIZE, MAX_RELAY_WEIGHTS
from learner.loss_settings import check_critic_warmup, check_proximal, check_strengths, check_value_head
from learner.reward_settings import GROUP_RELATIVE, check_group_relative

if TYPE_CHECKING:
    from learner.config import LearnerConfig

COUNTS = (
    "total_steps", "groups_per_step", "group_size", "max_new_tokens", "max_attempts",
    "max_skipped_steps", "micro_batch_tokens", "checkpoint_every_steps", "keep_checkpoints", "ranks",
)  # fmt: skip


def check(config: LearnerConfig) -> None:
    """Raises ValueError that names the setting, its value and what is possible."""
    for name in COUNTS:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    if config.max_staleness < 0:
        raise ValueError(f"max_staleness must be >= 0, got {config.max_staleness}; 0 means strictly on-policy")
    if not 0 < config.temperature < math.inf:
        raise ValueError(
            f"temperature must be finite and > 0, got {config.temperature}; a greedy policy explores nothing"
        )
    check_numbers(config)
    if config.advantage in GROUP_RELATIVE and config.group_size == 1:
        raise ValueError(
            f"group_size 1 leaves {config.advantage} nothing to compare with; use at least 2, or --advantage gae"
        )
    config.reward_settings.check_advantage(config.advantage)
    check_dynamic_sampling(config)
    check_critic_warmup(config.critic_warmup_steps, config.advantage)
    check_proximal(config.proximal, config.loss)
    if config.critic == "value_head":
        check_value_head(config.critic_model, config.critic_warmup_steps, config.advantage)
    check_strengths(config.entropy_coefficient, config.value_clip, config.value_coefficient)
    check_adapters(config)
    config.engine_settings.check_stage(config.zero_stage)
    config.kl_settings(config.model or "the demo model")  # raises ValueError for what is impossible
    if config.dtype == "bfloat16" and config.zero_stage == 0:
        raise ValueError(
            "dtype bfloat16 needs zero_stage 1, 2 or 3; at stage 0 DeepSpeed's Adam counts a step too many"
        )
    check_canary(config)
    check_relays(config)
    config.evaluation_settings  # noqa: B018  # raises ValueError for what is impossible
    check_lengths(config)
    check_queue(config)


def check_numbers(config: LearnerConfig) -> None:
    for name in ("learning_rate", "critic_learning_rate", "weight_decay", "warmup_steps"):
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be finite and >= 0, got {getattr(config, name)}")
    for name in ("max_grad_norm", "server_timeout_s", "adam_epsilon"):
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be finite and > 0, got {getattr(config, name)}")
    for name, beta in zip(("adam_beta1", "adam_beta2"), config.adam_betas, strict=True):
        if not 0 <= beta < 1:
            raise ValueError(f"{name} must be at least 0 and less than 1, got {beta}")


def check_dynamic_sampling(config: LearnerConfig) -> None:
    if config.dynamic_sampling < 0:
        raise ValueError(f"dynamic_sampling must be >= 0, got {config.dynamic_sampling}; 0 filters nothing")
    if config.dynamic_sampling > 0:
        check_group_relative("dynamic_sampling", config.advantage)


def check_adapters(config: LearnerConfig) -> None:
    if config.lora_settings is not None and config.reference_offload and config.reference_model is None:
        raise ValueError("reference_offload: with lora_rank the reference is the policy without its adapters")
    if config.lora_settings is not None and config.tensor_parallel > 1:
        raise ValueError(f"tensor_parallel must be 1 with lora_rank, got {config.tensor_parallel}")


def check_relays(config: LearnerConfig) -> None:
    if config.relay_weights != 0 and not 2 <= config.relay_weights <= MAX_RELAY_WEIGHTS:
        raise ValueError(
            f"relay_weights must be from 2 to {MAX_RELAY_WEIGHTS}, got {config.relay_weights}; 0 is for none"
        )


def check_canary(config: LearnerConfig) -> None:
    if config.canary_every is not None and config.canary_every < 0:
        raise ValueError(f"canary_every must be >= 0, got {config.canary_every}; 0 means never")
    if config.canary_tolerance is not None and not 0 < config.canary_tolerance < math.inf:
        raise ValueError(f"canary_tolerance must be finite and > 0, got {config.canary_tolerance}")


def check_lengths(config: LearnerConfig) -> None:
    if config.group_size > MAX_GROUP_SIZE:
        raise ValueError(f"group_size must be at most {MAX_GROUP_SIZE}, got {config.group_size}")
    if config.max_model_len is None:
        return
    if config.max_model_len < 2:
        raise ValueError(f"max_model_len must be at least 2, got {config.max_model_len}: a prompt and an answer")
    if config.max_new_tokens >= config.max_model_len:
        raise ValueError(
            f"max_new_tokens {config.max_new_tokens} leaves no room for a prompt within max_model_len "
            f"{config.max_model_len}"
        )


def check_queue(config: LearnerConfig) -> None:
    if config.queue_groups is not None and config.queue_groups < config.groups_per_step:
        raise ValueError(
            f"queue_groups {config.queue_groups} can never hold a batch of groups_per_step {config.groups_per_step}"
        )
    batch_bytes = config.groups_per_step * config.max_group_bytes
    if batch_bytes > config.queue_bytes:
        raise ValueError(
            f"queue_bytes {config.queue_bytes} can never hold a batch: {config.groups_per_step} groups of up to "
            f"{config.max_group_bytes} bytes; raise it to {batch_bytes}, or lower max_new_tokens or group_size"
        )
