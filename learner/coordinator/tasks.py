"""TaskSource: a task number -> its dataset row and seed, as a pure function, so that any task can be made again."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import xxhash

from common.environments import EnvironmentSpec
from learner.coordinator.mix import Mix
from learner.coordinator.rows import Rows, open_rows

SEED_BITS = 53  # what a message carries as a number
FEISTEL_ROUNDS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a lease says about its task."""

    row: bytes  # a JSON object with at least "prompt"
    seed: int  # the samples of the group derive theirs from it
    environment: int = 0  # its place among the run's environments


class Tasks(Protocol):
    """Tasks by number."""

    @property
    def name(self) -> str:
        """Names all that the tasks depend on, so that a resume with other ones is noticed."""
        ...

    @property
    def are_in_memory(self) -> bool:
        """A task takes microseconds: it need not be asked for in a thread."""
        ...

    def task(self, task_id: int) -> Task:
        """Raises rows.DataError when the row cannot be used."""
        ...


class TaskSource:
    """Tasks over rows. Each epoch goes through all rows once, in an order of its own given by the seed."""

    def __init__(self, rows: Rows, *, seed: int) -> None:
        self.rows = rows
        self.seed = seed
        self.name = f"{rows.name}, seed {seed}"
        self.are_in_memory = rows.are_in_memory

    def task(self, task_id: int) -> Task:
        """Raises rows.DataError when the row cannot be used."""
        num_rows = self.rows.num_rows
        if num_rows is None:
            index = task_id
        else:
            epoch, place = divmod(task_id, num_rows)
            index = shuffled(place, num_rows, key=f"order {self.seed} {epoch}")
        seed = xxhash.xxh3_64_intdigest(f"task {self.seed} {task_id}".encode()) >> (64 - SEED_BITS)
        return Task(row=self.rows.row(index), seed=seed)


class MixedTasks:
    """The tasks of several environments, which take turns by their weights."""

    def __init__(self, sources: Sequence[TaskSource], specs: Sequence[EnvironmentSpec]) -> None:
        self._sources = sources
        self._mix = Mix([spec.weight for spec in specs])
        pairs = zip(specs, sources, strict=True)
        self.name = "; ".join(f"{spec.name} x {spec.weight:g}: {source.name}" for spec, source in pairs)
        self.are_in_memory = all(source.are_in_memory for source in sources)

    def task(self, task_id: int) -> Task:
        place = self._mix.place(task_id)
        return replace(self._sources[place.environment].task(place.index), environment=place.environment)


def open_tasks(source: str, *, seed: int, specs: Sequence[EnvironmentSpec] = ()) -> Tasks:
    """Tasks over `path.jsonl`, `hf:NAME[:CONFIG][:SPLIT]` or `python:module:function`; raises rows.DataError.

    specs: the environments, if there are several or they have data of their own; each goes through its rows alone.
    """
    if len(specs) <= 1:
        return _open(next((spec.data for spec in specs if spec.data), source), seed=seed)
    sources = [_open(spec.data or source, seed=seed + number) for number, spec in enumerate(specs)]
    return MixedTasks(sources, specs)


def _open(source: str, *, seed: int) -> TaskSource:
    return TaskSource(open_rows(source, seed=seed), seed=seed)


def shuffled(place: int, num_places: int, *, key: str) -> int:
    """Where `place` goes under the permutation of range(num_places) that `key` names. Takes no memory.

    A Feistel network permutes the next power of four; walking its cycle until it comes back below num_places makes
    that a permutation of range(num_places) (Black and Rogaway 2002). At most four steps on average.
    """
    half_bits = max(1, ((num_places - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = place >> half_bits, place & mask
        for number in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (xxhash.xxh3_64_intdigest(f"{key} {number} {right}".encode()) & mask)
        place = left << half_bits | right
        if place < num_places:
            return place
