"""Held-out rows: which rows are evaluated, and that none with the same prompt is ever trained."""

from collections.abc import Sequence, Set

import msgspec
import xxhash

from common.environments import EnvironmentSpec
from learner.coordinator.mix import Mix
from learner.coordinator.rows import DataError, RepeatedRow, Rows, open_rows
from learner.coordinator.tasks import SEED_BITS, MixedTasks, Task, Tasks, TaskSource, shuffled

MAX_SKIPPED_ROWS = 100_000  # in a row: then there is nothing to train on, or nothing more to evaluate


class _Prompt(msgspec.Struct):
    """What tells rows apart: all else of a row may be a comment."""

    prompt: msgspec.Raw = msgspec.Raw(b"")
    responses_create_params: msgspec.Raw = msgspec.Raw(b"")


_decoder = msgspec.json.Decoder(_Prompt)


def prompt_digest(row: bytes) -> int:
    """Of what the policy reads first."""
    prompt = _decoder.decode(row)
    # Written anew: the same prompt may have other white space.
    raws = (prompt.prompt, prompt.responses_create_params)
    texts = [msgspec.json.encode(msgspec.json.decode(raw)) for raw in raws if raw]
    return xxhash.xxh3_64_intdigest(b"\0".join(texts))


class RowsWithout:
    """The rows but those whose prompt is held out. All of a finite source are read once for that."""

    def __init__(self, rows: Rows, held_out: Set[int]) -> None:
        """held_out: digests of prompts. Raises rows.DataError when nothing is left."""
        self._rows = rows
        self._held_out = held_out
        self._kept: list[int] = []  # numbers of rows of the source
        self._next = 0
        digest = xxhash.xxh3_64_hexdigest(" ".join(map(str, sorted(held_out))).encode())
        self.name = f"{rows.name}, {len(held_out)} prompts held out (digest {digest})"
        self.num_rows: int | None = None
        self.are_in_memory = rows.are_in_memory
        if rows.num_rows is not None:
            while self._next < rows.num_rows:
                self._read_one()
            self.num_rows = len(self._kept)
        if not self._kept:
            self.row(0)

    def row(self, index: int) -> bytes:
        skipped_from = self._next
        while index >= len(self._kept):
            is_at_end = self._rows.num_rows is not None and self._next >= self._rows.num_rows
            if is_at_end or self._next - skipped_from > MAX_SKIPPED_ROWS:
                raise DataError(
                    f"{self._rows.name}: nothing is left to train on when {len(self._held_out)} prompts are held out"
                )
            num_kept = len(self._kept)
            self._read_one()
            if len(self._kept) > num_kept:
                skipped_from = self._next
        return self._rows.row(self._kept[index])

    def _read_one(self) -> None:
        if prompt_digest(self._rows.row(self._next)) not in self._held_out:
            self._kept.append(self._next)
        self._next += 1


class HeldOutTasks:
    """The tasks of an evaluation, over one source of rows: as many of its prompts as were asked for, each once.

    Which they are depends on the rows and the seed alone, and so does what each is sampled with: evaluations of two
    versions differ in nothing but the policy.
    """

    are_in_memory = True

    def __init__(self, rows: Rows, *, num_tasks: int, seed: int, environment: int = 0) -> None:
        """Raises rows.DataError when the source has fewer prompts."""
        self._seed = seed
        self._environment = environment
        self._rows: list[bytes] = []
        self._digests: set[int] = set()
        if isinstance(rows, RepeatedRow):  # the environment makes each task from its seed
            self._rows = [rows.row(0)] * num_tasks
        else:
            self._read(rows, num_tasks)
        self.name = f"{num_tasks} of {rows.name}"

    @property
    def digests(self) -> Set[int]:
        """Of prompts that must not be trained."""
        return frozenset(self._digests)

    def task(self, task_id: int) -> Task:
        seed = xxhash.xxh3_64_intdigest(f"evaluation {self._seed} {task_id}".encode()) >> (64 - SEED_BITS)
        return Task(row=self._rows[task_id], seed=seed, environment=self._environment)

    def _read(self, rows: Rows, num_tasks: int) -> None:
        num_rows = rows.num_rows
        for place in range(MAX_SKIPPED_ROWS if num_rows is None else num_rows):
            if len(self._rows) == num_tasks:
                return
            index = place if num_rows is None else shuffled(place, num_rows, key=f"held out {self._seed}")
            row = rows.row(index)
            digest = prompt_digest(row)
            if digest not in self._digests:
                self._digests.add(digest)
                self._rows.append(row)
        if len(self._rows) < num_tasks:
            raise DataError(
                f"{rows.name}: {num_tasks} tasks are to be evaluated, there are {len(self._rows)} prompts; "
                "lower evaluation_tasks"
            )


class MixedHeldOutTasks:
    """Those of several environments, which have shares by their weights."""

    are_in_memory = True

    def __init__(self, sources: Sequence[HeldOutTasks], mix: Mix) -> None:
        self._sources = sources
        self._mix = mix
        self.name = "; ".join(source.name for source in sources)

    def task(self, task_id: int) -> Task:
        place = self._mix.place(task_id)
        return self._sources[place.environment].task(place.index)


def open_with_held_out(
    source: str, *, seed: int, num_tasks: int, evaluation_source: str = "", specs: Sequence[EnvironmentSpec] = ()
) -> tuple[Tasks, Tasks]:
    """Tasks to train, as tasks.open_tasks gives them but for the held-out ones, and tasks to evaluate.

    evaluation_source: where those are; empty: they are taken out of what is trained. Raises rows.DataError.
    """
    if evaluation_source and len(specs) > 1:
        raise DataError(
            f"evaluation_data {evaluation_source} says not which of {len(specs)} environments it is for; leave it out, "
            "and tasks are taken out of the data of each"
        )
    own = [spec.data or source for spec in specs] or [source]
    training = [open_rows(one, seed=seed + number) for number, one in enumerate(own)]
    mix = Mix([spec.weight for spec in specs] or [1.0])
    counts = [0] * len(training)
    for task_id in range(num_tasks):
        counts[mix.environment_of(task_id)] += 1
    rows = [open_rows(evaluation_source, seed=seed)] if evaluation_source else training
    held_out = [
        HeldOutTasks(one, num_tasks=count, seed=seed + number, environment=number)
        for number, (one, count) in enumerate(zip(rows, counts, strict=True))
    ]
    digests = frozenset[int]().union(*(tasks.digests for tasks in held_out))
    left = [
        TaskSource(rows if isinstance(rows, RepeatedRow) else RowsWithout(rows, digests), seed=seed + number)
        for number, rows in enumerate(training)
    ]
    if len(left) == 1:
        return left[0], held_out[0]
    return MixedTasks(left, specs), MixedHeldOutTasks(held_out, mix)
