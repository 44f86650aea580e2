"""CoordinatorSettings: what the coordinator's rules depend on."""

from dataclasses import dataclass
from typing import Literal

StaleAction = Literal["wait", "mask", "requeue"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRules:
    """What an evaluation consists of, and how long it may take; see evaluations.py. Raises ValueError."""

    num_tasks: int
    samples: int  # episodes of each task
    group_size: int  # of training: a server that takes a group takes so many episodes
    patience_s: float = 2.0  # that tasks wait for room that training leaves
    timeout_s: float = 600.0  # from when it is asked for; then it is given up
    max_begun: int = 3  # times, when versions are gone before it is done; then it is given up
    max_task_failures: int = 3  # then the evaluation goes without the task

    def __post_init__(self) -> None:
        for name in ("num_tasks", "samples", "group_size", "max_begun", "max_task_failures"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of an evaluation must be >= 1, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorSettings:
    """Raises ValueError for values under which a batch could never fill."""

    groups_per_step: int
    max_staleness: int  # K, in optimizer steps
    queue_groups: int  # running and queued together: a lease reserves its place
    queue_bytes: int  # likewise: a lease reserves max_group_bytes until the true size of its group is known
    max_group_bytes: int
    source: str = ""  # names the data source and its seed; a checkpoint of another one is refused
    stale_action: StaleAction = "wait"  # to running groups whose tokens would be too old at the next step
    max_filtered: int = 0  # groups of equal rewards for one step, see dynamic_sampling.py; 0: none
    max_requeues: int = 2  # of one task, with the stale action requeue; then it is waited for
    max_task_failures: int = 3  # then the task is parked
    max_task_losses: int = 16  # servers lost while they had the task; then it is parked
    failures_before_pause: int = 4  # in a row; then a server gets one lease at a time, after a growing pause
    notice_timeout_s: float = 2.5  # without a sign of life; then a server is named, and granted nothing more
    server_timeout_s: float = 10.0  # likewise; then its leases go to others
    hang_timeout_s: float = 120.0  # alive and with work to do, but without progress
    max_offences: int = 8  # without a good group in between; then a peer is quarantined
    environments: tuple[str, ...] = ("the environment",)  # their names
    environment_weights: tuple[float, ...] = (1.0,)  # their shares of the tasks, see mix.py
    evaluation: EvaluationRules | None = None  # None: there is none

    def __post_init__(self) -> None:
        if self.groups_per_step < 1:
            raise ValueError(f"groups_per_step must be >= 1, got {self.groups_per_step}")
        if self.max_staleness < 0:
            raise ValueError(f"max_staleness must be >= 0, got {self.max_staleness}; 0 means strictly on-policy")
        if self.max_filtered < 0:
            raise ValueError(f"max_filtered must be >= 0, got {self.max_filtered}; 0 filters nothing")
        if self.queue_groups < self.groups_per_step:
            raise ValueError(
                f"a queue of {self.queue_groups} groups can never hold a batch of {self.groups_per_step}; "
                f"set queue_groups to at least {self.groups_per_step}"
            )
        needed_bytes = self.groups_per_step * self.max_group_bytes
        if self.max_group_bytes < 1 or self.queue_bytes < needed_bytes:
            raise ValueError(
                f"a queue of {self.queue_bytes} bytes may never hold a batch of {self.groups_per_step} groups of up to "
                f"{self.max_group_bytes} bytes; set queue_bytes to at least {needed_bytes}"
            )
