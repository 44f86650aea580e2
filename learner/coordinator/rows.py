"""Where prompts come from: JSONL files, Hugging Face datasets, Python generators. Each yields rows as JSON objects."""

import importlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import msgspec
import xxhash

from common.lifecycle import UserError

MAX_ROW_BYTES = 1 << 20  # what a Lease carries
KEPT_ROW_BYTES = 64 << 20  # of a generator's rows, in case their tasks are leased again


class DataError(UserError):
    """The prompts cannot be read or are not what they should be; the text says where."""


class Rows(Protocol):
    """Rows by number. The same number always gives the same row: a task can be made again after a resume."""

    @property
    def name(self) -> str:
        """Names the source and what is in it, so that a resume with other rows is noticed."""
        ...

    @property
    def num_rows(self) -> int | None:
        """None: as many as are asked for."""
        ...

    @property
    def are_in_memory(self) -> bool:
        """A row is there at once: it need not be asked for in a thread."""
        ...

    def row(self, index: int) -> bytes:
        """Row `index` as a JSON object with at least "prompt"; raises DataError naming what is wrong with it."""
        ...


class Message(msgspec.Struct):
    """One chat message; it may carry more than these."""

    role: str
    content: str | list[dict[str, Any]]


class ResponsesParams(msgspec.Struct):
    """What a row of NeMo Gym has in place of a prompt."""

    input: str | list[dict[str, Any]]


class Row(msgspec.Struct):
    """What every row must have, one of both; an environment reads the rest."""

    prompt: str | list[Message] | msgspec.UnsetType = msgspec.UNSET
    responses_create_params: ResponsesParams | msgspec.UnsetType = msgspec.UNSET


_row_decoder = msgspec.json.Decoder(Row)


def check_row(row: bytes, where: str) -> None:
    """Raises DataError("`where`: ...") unless `row` is a JSON object with a usable prompt."""
    if len(row) > MAX_ROW_BYTES:
        raise DataError(f"{where}: the row has {len(row)} bytes, at most {MAX_ROW_BYTES} are possible")
    expected = '{"prompt": "..." or [messages], ...}'
    try:
        decoded = _row_decoder.decode(row)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{where}: expected {expected}: {error}") from error
    prompt: object = decoded.prompt
    if prompt is msgspec.UNSET and decoded.responses_create_params is not msgspec.UNSET:
        prompt = decoded.responses_create_params.input
    if prompt is msgspec.UNSET:
        raise DataError(f"{where}: expected {expected}: Object missing required field `prompt`")
    if not prompt:
        raise DataError(f"{where}: the prompt is empty")


def open_rows(source: str, *, seed: int) -> Rows:
    """`path.jsonl`, `hf:NAME[:CONFIG][:SPLIT]`, `python:module:function` or `system:TEXT`; raises DataError."""
    if source.startswith("system:"):
        return RepeatedRow(source)
    if source.startswith("hf:"):
        return HuggingFaceRows(source)
    if source.startswith("python:"):
        return GeneratorRows(source, load_function(source), seed=seed)
    if source.endswith((".jsonl", ".ndjson")):
        return JsonlRows(Path(source))
    raise DataError(
        f"prompts {source!r}: expected a file ending in .jsonl, hf:NAME[:CONFIG][:SPLIT], python:module:function, "
        "or system:TEXT"
    )


class RepeatedRow:
    """system:TEXT is the same system message for every task: for an environment server that makes its tasks itself,
    each from the seed of the task."""

    num_rows = None
    are_in_memory = True

    def __init__(self, source: str) -> None:
        self.name = source
        self._row = msgspec.json.encode({"prompt": [{"role": "system", "content": source.removeprefix("system:")}]})
        check_row(self._row, source)

    def row(self, index: int) -> bytes:
        del index
        return self._row


class JsonlRows:
    """A file of one JSON object per line; empty lines are skipped. All of it is read and checked at once."""

    are_in_memory = True

    def __init__(self, path: Path) -> None:
        self._rows: list[bytes] = []
        digest = xxhash.xxh3_64()
        try:
            with path.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    row = line.strip()
                    if row:
                        check_row(row, f"{path}:{number}")
                        digest.update(row + b"\n")
                        self._rows.append(row)
        except OSError as error:
            raise DataError(f"prompts {path} cannot be read: {error.strerror}") from error
        if not self._rows:
            raise DataError(f"prompts {path}: the file has no rows")
        self.num_rows = len(self._rows)
        self.name = f"{path.name} ({self.num_rows} rows, digest {digest.hexdigest()})"

    def row(self, index: int) -> bytes:
        return self._rows[index]


class HuggingFaceRows:
    """A split of a dataset by its name on the hub or its local folder."""

    are_in_memory = False

    def __init__(self, source: str) -> None:
        import datasets  # only here: importing it takes seconds

        name, config, split = _split_name(source)
        try:
            self._dataset = datasets.load_dataset(name, config, split=split)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataError(f"prompts {source}: the dataset cannot be loaded: {error}") from error
        self.source = source
        self.num_rows = len(self._dataset)
        if not self.num_rows:
            raise DataError(f"prompts {source}: the split has no rows")
        digest = xxhash.xxh3_64_hexdigest(self.row(0) + self.row(self.num_rows - 1))
        self.name = f"{source} ({self.num_rows} rows, digest {digest})"

    def row(self, index: int) -> bytes:
        where = f"{self.source} row {index}"
        try:
            row = msgspec.json.encode(self._dataset[index])
        except TypeError as error:
            raise DataError(f"{where}: a column cannot be written as JSON: {error}; drop it first") from error
        check_row(row, where)
        return row


def _split_name(source: str) -> tuple[str, str | None, str]:
    """hf:NAME[:CONFIG][:SPLIT] -> name, config, split."""
    parts = source.split(":")[1:]
    if not 1 <= len(parts) <= 3 or not all(parts):
        raise DataError(f"prompts {source!r}: expected hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
    return parts[0], parts[1] if len(parts) == 3 else None, parts[-1] if len(parts) > 1 else "train"


class GeneratorRows:
    """Rows of a user's generator function, in its own order.

    A generator that ends is called again: with a parameter `seed` it gets seed, seed + 1, ..., so that each round may
    differ. It must yield the same rows for the same seed: a resume runs it again up to the first task it needs,
    and so does a row that is asked for after 64 MiB of newer ones.
    """

    num_rows = None
    are_in_memory = False

    def __init__(self, source: str, function: Callable[..., Iterable[object]], *, seed: int) -> None:
        self.name = source
        self._function = function
        self._seed = seed
        self._kept: OrderedDict[int, bytes] = OrderedDict()  # consecutive, up to the newest row
        self._start()
        self.name = f"{source} (first row {xxhash.xxh3_64_hexdigest(self.row(0))})"

    def _start(self) -> None:
        self._rounds = 0
        self._next_index = 0
        self._kept.clear()
        self._kept_bytes = 0
        self._iterator: Iterator[object] = iter(())

    def row(self, index: int) -> bytes:
        if index < self._next_index and index not in self._kept:
            self._start()
        while index >= self._next_index:
            self._read_one()
        return self._kept[index]

    def _read_one(self) -> None:
        where = f"{self.name} row {self._next_index}"
        try:
            value = self._pull()
        except Exception as error:  # whatever the user's code raises
            raise DataError(f"{where}: the generator raised {type(error).__name__}: {error}") from error
        try:
            row = msgspec.json.encode(value)
        except TypeError as error:
            raise DataError(f"{where}: the row cannot be written as JSON: {error}") from error
        check_row(row, where)
        self._kept[self._next_index] = row
        self._next_index += 1
        self._kept_bytes += len(row)
        while self._kept_bytes > KEPT_ROW_BYTES and len(self._kept) > 1:
            self._kept_bytes -= len(self._kept.popitem(last=False)[1])

    def _pull(self) -> object:
        """The next row, from a new round if the last one has ended."""
        for row in self._iterator:
            return row
        takes_seed = "seed" in inspect.signature(self._function).parameters
        rows = self._function(seed=self._seed + self._rounds) if takes_seed else self._function()
        self._iterator = iter(rows)
        self._rounds += 1
        for row in self._iterator:
            return row
        raise EOFError(f"it yielded no rows in round {self._rounds}")


def load_function(source: str) -> Callable[..., Iterable[object]]:
    """The function that `python:module:function` names; raises DataError."""
    parts = source.split(":")
    if len(parts) != 3 or not all(parts):
        raise DataError(f"prompts {source!r}: expected python:module:function")
    try:
        module = importlib.import_module(parts[1])
    except ImportError as error:
        raise DataError(f"prompts {source}: module {parts[1]} cannot be imported: {error}") from error
    function = getattr(module, parts[2], None)
    if not callable(function):
        raise DataError(f"prompts {source}: module {parts[1]} has no function {parts[2]}")
    return function  # type: ignore[no-any-return]  # what it yields is checked row by row
