"""From the one configuration to what each part needs to know: the seam between settings and parts."""

import secrets
import shutil

from common.keys import ServerKeys
from common.lifecycle import UserError
from learner import joining
from learner.algorithms import build_advantages, build_aggregation, build_corrections, build_loss
from learner.config import LearnerConfig
from learner.coordinator.service_settings import HeldOut, ServiceSettings
from learner.coordinator.settings import CoordinatorSettings, EvaluationRules
from learner.evaluation_settings import EvaluationSettings
from learner.loss_settings import WITH_CRITIC
from learner.run_directory import RunDirectory
from learner.training import TrainSettings


def model_of(config: LearnerConfig, run: RunDirectory) -> str:
    """The model to train; without one, the demo's, made in the run directory."""
    if config.model is not None:
        return config.model
    from learner.demo.model import build_demo_model

    directory = run.path / "demo-model"
    if not directory.exists():
        unfinished = run.path / "demo-model.tmp"
        shutil.rmtree(unfinished, ignore_errors=True)
        build_demo_model(unfinished, seed=config.seed)
        unfinished.rename(directory)
    return str(directory)


def train_settings(config: LearnerConfig, model: str) -> TrainSettings:
    """Raises UserError for an algorithm or a setting of it that does not exist."""
    try:
        build_loss(config.loss, config.loss_setting)
        build_corrections(config.correction or None, loss=config.loss)
        build_aggregation(config.aggregation)
        build_advantages(config.advantage, config.advantage_setting)
    except ValueError as error:
        raise UserError(str(error)) from error
    has_own_critic = config.advantage in WITH_CRITIC and config.critic == "own"
    return TrainSettings(
        model=model,
        critic_model=(config.critic_model or model) if has_own_critic else None,
        value_head=config.critic == "value_head",
        lora=config.lora_settings,
        lora_snapshots=config.lora_snapshots,
        dtype=config.dtype,
        zero_stage=config.zero_stage,
        engine=config.engine_settings,
        learning_rate=config.learning_rate,
        critic_learning_rate=config.critic_learning_rate,
        critic_warmup_steps=config.critic_warmup_steps,
        lr_schedule=config.lr_schedule,
        warmup_steps=config.warmup_steps,
        total_steps=config.total_steps,
        adam_betas=config.adam_betas,
        adam_epsilon=config.adam_epsilon,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        on_nonfinite=config.on_nonfinite,
        micro_batch_tokens=config.micro_batch_tokens,
        temperature=config.temperature,
        max_staleness=config.max_staleness,
        loss=config.loss,
        loss_settings=config.loss_setting,
        corrections=config.correction or None,
        proximal=config.proximal,
        aggregation=config.aggregation,
        entropy_coefficient=config.entropy_coefficient,
        value_clip=config.value_clip,
        value_coefficient=config.value_coefficient,
        max_new_tokens=config.max_new_tokens,
        advantage=config.advantage,
        advantage_settings=config.advantage_setting,
        rewards=config.reward_settings,
        kl=config.kl_settings(model),
        seed=config.seed,
    )


def coordinator_settings(
    config: LearnerConfig, settings: TrainSettings, run: RunDirectory, keys: ServerKeys | None
) -> ServiceSettings:
    evaluation = config.evaluation_settings
    rules = CoordinatorSettings(
        groups_per_step=config.groups_per_step,
        max_staleness=config.max_staleness,
        queue_groups=config.queue_capacity,
        queue_bytes=config.queue_bytes,
        stale_action=config.stale_action,
        max_group_bytes=config.max_group_bytes,
        max_filtered=config.dynamic_sampling,
        max_task_failures=config.max_attempts,
        server_timeout_s=config.server_timeout_s,
        environments=tuple(spec.name for spec in config.environment.specs),
        environment_weights=tuple(spec.weight for spec in config.environment.specs),
        evaluation=evaluation_rules(evaluation, group_size=config.group_size) if evaluation is not None else None,
    )
    return ServiceSettings(
        run_id=run.lineage_id,
        learner_socket=f"ipc://{run.private}/coordinator",
        listen=joining.listen_address(config, run),
        rules=rules,
        model=settings.model,
        environments=config.environment.specs,
        prompts=config.data,
        seed=config.seed,
        group_size=config.group_size,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        evaluation=held_out(evaluation) if evaluation is not None else None,
        relay_weights=config.relay_weights,
        keys=str(keys.directory) if keys is not None else "",
        lease_secret=secrets.token_hex(32),
        journal=str(run.path / "journal.sqlite"),
        event_log=str(run.path / f"events-coordinator-{run.lineage}.jsonl"),
    )


def evaluation_rules(evaluation: EvaluationSettings, *, group_size: int) -> EvaluationRules:
    return EvaluationRules(
        num_tasks=evaluation.tasks, samples=evaluation.samples, group_size=group_size, timeout_s=evaluation.timeout_s
    )


def held_out(evaluation: EvaluationSettings) -> HeldOut:
    return HeldOut(
        data=evaluation.data, samples=evaluation.samples, temperature=evaluation.temperature, hold_s=evaluation.hold_s
    )
