"""The audit: what learners, servers, journal and last checkpoint recorded must fit together, whatever was killed.

It reads files only, and knows nothing of how the coordinator comes to its decisions.
"""

import base64
import json
import sqlite3
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.events import read_events


@dataclass(frozen=True)
class Records:
    """What was recorded outside the coordinator's rules."""

    steps: dict[int, list[dict[str, Any]]]  # step -> its records, by lineage
    acknowledged: dict[int, set[int]]  # lease -> tasks, as servers were told
    journaled: dict[int, int]  # lease -> task, of groups that are accepted and not trained at the end
    frontier: dict[str, Any]  # of the last checkpoint
    num_covered: int  # groups that are still in the journal though the last checkpoint covers them
    evaluations: list[dict[str, Any]]  # by time
    canaries: dict[bool, int]  # how many versions servers computed with as they should, and how many they did not
    equal_rewards: set[int]  # tasks of which two samples had the same reward, as environments said
    filtered_lately: set[int]  # tasks that the journal has as filtered, and the last checkpoint as open or not at all


@dataclass
class Verdict:
    """What was found. No complaints: the run is as if nothing had ever been killed."""

    num_steps: int = 0
    num_lineages: int = 0
    num_acknowledged: int = 0
    num_repeated: int = 0  # steps that were taken in more than one lineage
    num_evaluations: int = 0  # complete
    num_filtered: int = 0  # tasks
    complaints: list[str] = field(default_factory=list)

    def check(self, is_right: bool, complaint: str) -> None:
        if not is_right:
            self.complaints.append(complaint)


def read_records(directory: Path) -> Records:
    run = directory / "run"
    steps: dict[int, list[dict[str, Any]]] = {}
    evaluations: list[dict[str, Any]] = []
    logs = sorted(run.glob("events-learner-*.jsonl"), key=lambda path: int(path.stem.rpartition("-")[2]))
    for lineage, log in enumerate(logs, start=1):
        for event in read_events([log]):
            if event["kind"] == "step":
                steps.setdefault(event["step"], []).append(event | {"lineage": lineage})
            if event["kind"] == "evaluation":
                evaluations.append(event)
    acknowledged: dict[int, set[int]] = {}
    canaries = {True: 0, False: 0}
    for event in read_events(sorted(directory.glob("server-*/events-*.jsonl"))):
        if event["kind"] == "canary":
            canaries[event["ok"]] += 1
        if event["kind"] == "group_acknowledged":
            acknowledged.setdefault(event["lease"], set()).add(event["task"])
    with sqlite3.connect(run / "journal.sqlite") as database:
        last = max(steps)
        rows = database.execute(
            "SELECT lease_id, task_id FROM groups WHERE batch_version IS NULL OR batch_version >= ?", (last,)
        ).fetchall()
        filtered = {task for (task,) in database.execute("SELECT task_id FROM filtered")}
        covered = database.execute("SELECT count(*) FROM groups WHERE batch_version < ?", (last,)).fetchone()[0]
    database.close()
    current = (run / "checkpoints" / "CURRENT").read_text().strip()
    state = json.loads((run / "checkpoints" / current / "run.json").read_text())
    frontier = json.loads(base64.b64decode(state["frontier"]))
    return Records(
        steps=steps, acknowledged=acknowledged, journaled=dict(rows), frontier=frontier, num_covered=covered,
        canaries=canaries, evaluations=evaluations, filtered_lately=filtered,
        equal_rewards=_with_equal_rewards(directory / "rewards.jsonl"),
    )  # fmt: skip


def _with_equal_rewards(path: Path) -> set[int]:
    """Nothing where rewards were not noted."""
    if not path.exists():
        return set()
    samples = Counter(tuple(json.loads(line)) for line in path.read_text().splitlines())
    return {int(task) for (task, _), number in samples.items() if number > 1}


def audit(
    records: Records, *, total_steps: int, groups_per_step: int, max_staleness: int, max_filtered: int = 0
) -> Verdict:
    """max_filtered: groups that may be filtered for a step, of two samples each."""
    verdict = Verdict(
        num_steps=len(records.steps),
        num_lineages=max(record["lineage"] for taken in records.steps.values() for record in taken),
        num_acknowledged=len(records.acknowledged),
        num_repeated=sum(len(taken) > 1 for taken in records.steps.values()),
    )
    verdict.check(sorted(records.steps) == list(range(1, total_steps + 1)), f"steps are {sorted(records.steps)}")
    _check_steps(records, verdict, groups_per_step=groups_per_step, max_staleness=max_staleness)
    verdict.check(records.num_covered == 0, f"the journal keeps {records.num_covered} groups that nobody needs")
    verdict.check(records.canaries[False] == 0, f"{records.canaries[False]} versions were not what was computed with")
    verdict.check(records.canaries[True] > 0, "no server was asked whether it computes with what it loaded")
    _check_evaluations(records, verdict, total_steps)
    survived = [taken[-1] for _, taken in sorted(records.steps.items())]
    trained = {
        lease: task for record in survived for lease, task in zip(record["leases"], record["tasks"], strict=True)
    }
    filtered = _check_tasks(records, verdict, [task for record in survived for task in record["tasks"]])
    verdict.num_filtered = len(filtered)
    most = max_filtered * (total_steps + 1)
    verdict.check(len(filtered) <= most, f"{len(filtered)} tasks were filtered, {most} may be: {sorted(filtered)}")
    for lease, tasks in sorted(records.acknowledged.items()):
        verdict.check(len(tasks) == 1, f"lease {lease} was acknowledged for tasks {sorted(tasks)}")
        kept = trained.get(lease, records.journaled.get(lease))
        verdict.check(
            kept in tasks or (kept is None and tasks <= filtered),
            f"lease {lease} of task {sorted(tasks)} was acknowledged, and is lost",
        )
    return verdict


def _check_steps(records: Records, verdict: Verdict, *, groups_per_step: int, max_staleness: int) -> None:
    for step, taken in sorted(records.steps.items()):
        for record in taken:
            where = f"step {step} in lineage {record['lineage']}"
            verdict.check(len(set(record["leases"])) == groups_per_step, f"{where} trained leases {record['leases']}")
            verdict.check(
                record["over_stale_tokens"] == 0, f"{where} had {record['over_stale_tokens']} over-stale tokens"
            )
            verdict.check(record["staleness_max"] <= max_staleness, f"{where} had staleness {record['staleness_max']}")
            verdict.check(
                record["leases"] == taken[0]["leases"],
                f"{where} trained leases {record['leases']}, in lineage {taken[0]['lineage']} {taken[0]['leases']}",
            )


def _check_evaluations(records: Records, verdict: Verdict, total_steps: int) -> None:
    """Whatever was killed: the last version is evaluated, and what is told of a version is of all tasks."""
    for event in records.evaluations:
        where = f"the evaluation of version {event['asked_version']}"
        verdict.check(event["complete"] or bool(event["reason"]), f"{where} is neither complete nor given up: {event}")
        verdict.check(not event["failed"], f"{where} failed at {event['failed']}")
        verdict.check(event["version"] >= event["asked_version"] or not event["complete"], f"{where} is of another")
    complete = [event["version"] for event in records.evaluations if event["complete"]]
    verdict.check(bool(complete) and complete[-1] == total_steps, f"complete evaluations are of versions {complete}")
    verdict.num_evaluations = len(complete)


def _check_tasks(records: Records, verdict: Verdict, trained: list[int]) -> set[int]:
    """Every task that was handed out is in exactly one place. Returns those that are in none: they were filtered."""
    verdict.check(len(trained) == len(set(trained)), f"tasks were trained twice: {_doubles(trained)}")
    still_open = [task[0] for task in records.frontier["open_tasks"] if task[0] not in records.filtered_lately]
    parked = [int(task) for task in records.frontier["parked"]]
    places = sorted([*trained, *still_open, *parked])
    # Of those that were handed out after the last checkpoint some are filtered, which the journal knows.
    handed_out = {*range(records.frontier["next_task_id"]), *records.filtered_lately}
    filtered, doubles = handed_out - set(places), _doubles(places)
    lost = sorted(filtered - records.equal_rewards)
    verdict.check(not lost, f"tasks were skipped: {lost}")
    verdict.check(not doubles, f"tasks are in two places: {doubles}")
    verdict.check(not parked, f"tasks are parked: {parked}")
    return filtered


def _doubles(numbers: list[int]) -> list[int]:
    return sorted({number for number in numbers if numbers.count(number) > 1})
