"""Recovery: from a checkpoint's frontier and the journal to where the run goes on. Pure functions.

The frontier alone is enough to skip no prompt and repeat none. The journal adds what was accepted since: batches that
were delivered are delivered again as they were, accepted groups are queued, everything else that was handed out is
leased again.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from learner.coordinator.ledger import FrontierError, FrontierState, OpenTask, PastLeases
from learner.coordinator.replay_queue import JournaledGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalContents:
    """What a journal knows, the groups' bytes excepted."""

    groups: Sequence[JournaledGroup] = ()
    parked: dict[int, str] = field(default_factory=dict)  # task -> reason
    filtered: dict[int, int] = field(default_factory=dict)  # task -> version for whose step its group was filtered
    past: PastLeases = field(default_factory=PastLeases)
    forgotten_up_to: int = 0  # batches of earlier versions were deleted: a checkpoint covered them


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """Where a run begins or goes on."""

    version: int
    tasks: FrontierState
    batches: dict[int, tuple[JournaledGroup, ...]]  # by version, to be delivered again
    queued: tuple[JournaledGroup, ...]
    past: PastLeases
    next_lease_id: int
    filtered: dict[int, int]  # task -> version for whose step its group was filtered


def recover(frontier: FrontierState, journal: JournalContents, *, version: int) -> Recovered:
    """The run at `version`, which is the frontier's after a crash of the learner, and may be later if it lives.

    Raises ledger.FrontierError when steps lie between the two of which the journal knows nothing.
    """
    batches: dict[int, list[JournaledGroup]] = defaultdict(list)
    for group in journal.groups:
        if group.batch_version is not None:
            batches[group.batch_version].append(group)
    trained = [group for step in range(frontier.version, version) for group in _trained_at(step, batches)]
    to_repeat = {step: _in_order(groups) for step, groups in batches.items() if step >= version}
    queued = tuple(group for group in journal.groups if group.batch_version is None)
    kept = [*queued, *(group for groups in to_repeat.values() for group in groups)]
    past = _past(frontier, journal, num_trained=len(trained), num_kept=len(kept))
    return Recovered(
        version=version,
        tasks=_tasks(frontier, journal, trained=trained, kept=kept),
        batches=to_repeat,
        queued=queued,
        past=past,
        next_lease_id=past.next_lease_id,
        filtered=journal.filtered,
    )


def _trained_at(step: int, batches: dict[int, list[JournaledGroup]]) -> list[JournaledGroup]:
    if step not in batches:
        raise FrontierError(
            f"the learner has trained version {step}, but the journal does not know the batch; start the learner again "
            "from its checkpoint"
        )
    return batches[step]


def _in_order(groups: list[JournaledGroup]) -> tuple[JournaledGroup, ...]:
    return tuple(sorted(groups, key=lambda group: group.task_id))


def _tasks(
    frontier: FrontierState, journal: JournalContents, *, trained: list[JournaledGroup], kept: list[JournaledGroup]
) -> FrontierState:
    """The tasks to lease again, the oldest first: handed out before or since the frontier, and nowhere fulfilled."""
    fulfilled = {*(group.task_id for group in (*trained, *kept)), *journal.filtered}
    parked = {task_id: why for task_id, why in (frontier.parked | journal.parked).items() if task_id not in fulfilled}
    next_task_id = max([frontier.next_task_id, *(task_id + 1 for task_id in (*fulfilled, *parked))])
    since = (OpenTask(task_id) for task_id in range(frontier.next_task_id, next_task_id))
    open_tasks = tuple(
        task for task in (*frontier.open_tasks, *since) if task.task_id not in fulfilled and task.task_id not in parked
    )
    return msgspec.structs.replace(frontier, next_task_id=next_task_id, open_tasks=open_tasks, parked=parked)


def _past(frontier: FrontierState, journal: JournalContents, *, num_trained: int, num_kept: int) -> PastLeases:
    """The counts go on; leases of which nothing is left were cancelled by the restart."""
    newer = journal.past if journal.past.leased >= frontier.past.leased else frontier.past
    trained = frontier.past.trained + num_trained
    ended = trained + sum(newer.failed.values()) + sum(newer.cancelled.values()) + newer.expired
    leased = max(newer.leased, ended + num_kept)
    lost = leased - ended - num_kept
    cancelled = newer.cancelled | ({"restart": newer.cancelled.get("restart", 0) + lost} if lost else {})
    told_ids = [frontier.past.next_lease_id, journal.past.next_lease_id]
    known_ids = [*told_ids, *(group.lease_id + 1 for group in journal.groups)]
    return msgspec.structs.replace(
        newer,
        leased=leased,
        next_lease_id=max(known_ids),
        trained=trained,
        cancelled=cancelled,
    )
