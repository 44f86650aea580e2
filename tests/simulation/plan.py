"""Plan: everything about a history that its seed decides beforehand: configuration, machines, and what goes wrong."""

import math
import random
from dataclasses import dataclass, replace

from learner.coordinator.settings import CoordinatorSettings, EvaluationRules, StaleAction

TAIL = 10.0  # p99 of the lengths over their median
SIGMA = math.log(TAIL) / 2.3263  # of the logarithm; 2.3263 is the 99th percentile of a normal distribution
MAX_SAMPLED_TOKENS = 24
MAX_GROUP_BYTES = 4096  # the largest honest group has fewer

FAULTS = {  # mean number of times in a history, where they happen at all
    "cut": 3.0,
    "partition": 1.5,
    "server_crash": 2.0,
    "server_leave": 1.0,
    "server_hang": 1.0,
    "server_pause": 2.0,
    "coordinator_crash": 1.5,
    "coordinator_pause": 1.0,
    "learner_crash": 1.5,
    "learner_pause": 1.0,
    "slow_disk": 1.0,
    "outage": 0.7,
}
LIES = (
    "future_version", "unconfirmed_version", "too_stale", "wrong_task", "too_large", "not_yours", "replayed",
    "not_finite", "garbage", "boast", "old_claim", "forged_claim",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerPlan:
    """One machine with a rollout server."""

    name: str
    key: str
    capacity_groups: int
    median_s: float  # to sample a group
    lies: tuple[str, ...]  # empty for an honest one
    starts_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the seed decides. Times are virtual seconds."""

    seed: int
    rules: CoordinatorSettings
    servers: tuple[ServerPlan, ...]
    faults: tuple[tuple[float, str], ...]  # when, what
    latency_s: float  # of one message, mean
    duplicated: float  # share of messages that arrive twice
    failing: float  # share of leases that servers cannot fulfil
    equal: float  # share of tasks whose groups have equal rewards
    training_s: float
    publishing_s: float
    pulling_s: float
    saving_s: float
    commit_s: float
    checkpoint_every_steps: int
    evaluate_every_steps: int  # 0: never
    hold_s: float  # that a server may stay at a version for an evaluation
    heartbeat_s: float
    resend_s: float
    chaos_s: float  # then everything is mended, and must go on by itself
    chaos_steps: int  # at most


def plan_of(seed: int) -> Plan:
    """Small and fast configurations: what is rare at full size must happen often here."""
    rng = random.Random(seed)
    evaluate_every_steps, hold_s, evaluation = _evaluations(random.Random(f"evaluations {seed}"))
    max_filtered, equal = _filtering(random.Random(f"filtering {seed}"))
    rules = replace(_rules(rng), evaluation=evaluation, max_filtered=max_filtered)
    chaos_s = rng.uniform(8.0, 22.0)
    return Plan(
        seed=seed,
        rules=rules,
        servers=_servers(rng),
        faults=_faults(rng, chaos_s),
        latency_s=rng.choice([0.0005, 0.005, 0.05]),
        duplicated=rng.choice([0.0, 0.0, 0.05, 0.3]),
        failing=rng.choice([0.0, 0.0, 0.05, 0.25]),
        equal=equal,
        training_s=rng.choice([0.05, 0.3, 1.0]),
        publishing_s=rng.choice([0.01, 0.1, 0.6]),
        pulling_s=rng.choice([0.02, 0.2, 0.8]),
        saving_s=rng.choice([0.02, 0.4]),
        commit_s=rng.choice([0.001, 0.01, 0.05]),
        checkpoint_every_steps=rng.choice([1, 2, 3, 5]),
        evaluate_every_steps=evaluate_every_steps,
        hold_s=hold_s,
        heartbeat_s=1.0,
        resend_s=rng.choice([1.5, 5.0]),
        chaos_s=chaos_s,
        chaos_steps=max(4, 48 // rules.groups_per_step),
    )


def _rules(rng: random.Random) -> CoordinatorSettings:
    groups_per_step = rng.randint(1, 8)
    max_staleness = rng.randint(0, 4)
    ceiling = (max_staleness + 1) * groups_per_step
    actions: list[StaleAction] = ["wait", "wait", "requeue", "mask"]
    return CoordinatorSettings(
        groups_per_step=groups_per_step,
        max_staleness=max_staleness,
        queue_groups=rng.randint(groups_per_step, ceiling + 4),
        queue_bytes=rng.randint(groups_per_step * MAX_GROUP_BYTES, (ceiling + 2) * MAX_GROUP_BYTES),
        max_group_bytes=MAX_GROUP_BYTES,
        source="simulated",
        stale_action=rng.choice(actions),
        max_task_failures=rng.choice([2, 3, 5]),
        max_task_losses=rng.choice([3, 16]),
        notice_timeout_s=2.5,
        server_timeout_s=5.0,
        hang_timeout_s=8.0,
        max_offences=rng.choice([1, 3, 8]),
    )


def _filtering(rng: random.Random) -> tuple[int, float]:
    """Two thirds of the histories have none."""
    return rng.choice([0, 0, 0, 0, 2, 8]), rng.choice([0.1, 0.5, 0.9])


def _evaluations(rng: random.Random) -> tuple[int, float, EvaluationRules | None]:
    """Half of the histories have none."""
    if rng.random() < 0.5:
        return 0, 0.0, None
    rules = EvaluationRules(
        num_tasks=rng.randint(1, 6),
        samples=rng.randint(1, 3),
        group_size=rng.randint(1, 4),
        patience_s=rng.choice([0.0, 0.5, 2.0]),
        timeout_s=rng.choice([4.0, 30.0]),
        max_task_failures=rng.choice([1, 3]),
    )
    return rng.choice([1, 2, 5]), rng.choice([0.0, 0.5, 4.0, 10.0]), rules


def _servers(rng: random.Random) -> tuple[ServerPlan, ...]:
    """At least one is honest, or nothing could be demanded of the others."""
    number = rng.randint(1, 6)
    num_liars = rng.choice([0, 0, 1, 2]) if number > 1 else 0
    median_s = rng.choice([0.1, 0.4])
    servers = [
        ServerPlan(
            name=f"server-{index}",
            key=f"{index:02x}" * 4,
            capacity_groups=rng.choice([1, 2, 4, 16]),
            median_s=median_s * rng.choice([0.5, 1.0, 1.0, 3.0]),
            lies=tuple(sorted(rng.sample(LIES, rng.randint(1, 4)))) if 0 < index <= num_liars else (),
            starts_at=rng.choice([0.0, 0.0, 1.0, rng.uniform(0.0, 15.0)]) if index else 0.0,
        )
        for index in range(number)
    ]
    return tuple(servers)


def _faults(rng: random.Random, chaos_s: float) -> tuple[tuple[float, str], ...]:
    """Each kind is absent from half of the histories, so that others show what they do alone (swarm testing)."""
    violence = rng.choice([0.0, 0.5, 1.0, 2.0])
    faults = [
        (rng.uniform(0.5, chaos_s), kind)
        for kind, mean in FAULTS.items()
        if rng.random() < 0.5
        for _ in range(_poisson(rng, 2.0 * mean * violence * chaos_s / 20.0))
    ]
    return tuple(sorted(faults))


def _poisson(rng: random.Random, mean: float) -> int:
    """Number of arrivals in one unit of time (Knuth 1969)."""
    limit, number, product = math.exp(-mean), 0, rng.random()
    while product > limit:
        number += 1
        product *= rng.random()
    return number
