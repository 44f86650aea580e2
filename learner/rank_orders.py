"""Several ranks behind one TrainEngine: rank 0 is called, and orders the others to do the same beside it.

Orders, batches and answers travel between ranks as validated bytes; gradients and parameters as DeepSpeed moves them.
"""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
from torch import Tensor

from common.lifecycle import UserError
from learner.batch_codec import decode_batch, encode_batch, part_of
from learner.ranks import Ranks
from learner.training import BatchLayout, StepResult, TrainBatch, TrainEngine, TrainSettings, WriteState

logger = logging.getLogger(__name__)


class Open(msgspec.Struct, frozen=True, tag=True):
    """The first order: what engine to open."""

    settings: TrainSettings
    checkpoint: str | None  # directory to resume from


class Step(msgspec.Struct, frozen=True, tag=True):
    """Train on the batch that is scattered next."""


class GatherTensors(msgspec.Struct, frozen=True, tag=True):
    """Take part in gathering what a snapshot consists of."""


class GatherBaseModel(msgspec.Struct, frozen=True, tag=True):
    """Take part in gathering what adapters stand beside."""


class TokenLogprobs(msgspec.Struct, frozen=True, tag=True):
    token_ids: tuple[int, ...]


class CopyState(msgspec.Struct, frozen=True, tag=True):
    """Copy this rank's part of a checkpoint, and write it when told where, beside what is ordered next."""


class Export(msgspec.Struct, frozen=True, tag=True):
    directory: str


class KeepWaiting(msgspec.Struct, frozen=True, tag=True):
    """Rank 0 is there, and has nothing to do."""


class Stop(msgspec.Struct, frozen=True, tag=True):
    """The run is over, or rank 0 gives up."""


Order = Open | Step | GatherTensors | GatherBaseModel | TokenLogprobs | CopyState | Export | KeepWaiting | Stop
OpenEngine = Callable[[TrainSettings, Path | None, Ranks], TrainEngine]

_decoder = msgspec.json.Decoder(Order)


def _say(ranks: Ranks, order: Order) -> None:
    ranks.broadcast(msgspec.json.encode(order))


def lead(
    settings: TrainSettings, checkpoint: Path | None, open_engine: OpenEngine, ranks: Ranks, writing: Ranks
) -> TrainEngine:
    """On rank 0: the engine of all ranks. writing: a second line between them, for checkpoints alone."""
    if ranks.size == 1:
        return open_engine(settings, checkpoint, ranks)
    _say(ranks, Open(settings, str(checkpoint) if checkpoint is not None else None))
    engine = _opened(open_engine, settings, checkpoint, ranks)
    return LeadingEngine(engine, ranks, writing)


def dismiss(ranks: Ranks) -> None:
    """On rank 0, in place of lead(): there is nothing to do, and the others end."""
    _say(ranks, Stop())


def follow(open_engine: OpenEngine, ranks: Ranks, writing: Ranks) -> None:
    """On every other rank: obey until told to stop. Raises RuntimeError when another rank is gone."""
    order = _decoder.decode(ranks.broadcast())
    if isinstance(order, Stop):
        return
    assert isinstance(order, Open)
    engine = _opened(open_engine, order.settings, Path(order.checkpoint) if order.checkpoint else None, ranks)
    with ThreadPoolExecutor(1, thread_name_prefix="checkpoints") as writer:
        while not isinstance(order := _decoder.decode(ranks.broadcast()), Stop):
            if isinstance(order, CopyState):
                writer.submit(_write_together, engine.copy_state(), writing)
            else:
                _obey(order, engine, ranks)


def _obey(order: Order, engine: TrainEngine, ranks: Ranks) -> None:
    match order:
        case Step():
            engine.step(decode_batch(ranks.scatter()))
        case GatherTensors():
            for _ in engine.snapshot_tensors():
                pass
        case GatherBaseModel():
            for _ in engine.base_model_tensors():
                pass
        case TokenLogprobs(token_ids=token_ids):
            engine.token_logprobs(np.array(token_ids, dtype=np.int32))
        case Export(directory=directory):
            engine.export_huggingface(Path(directory))


def _opened(open_engine: OpenEngine, settings: TrainSettings, checkpoint: Path | None, ranks: Ranks) -> TrainEngine:
    """Raises UserError on every rank when one of them cannot open it."""
    engine: TrainEngine | None = None
    complaint = ""
    try:
        engine = open_engine(settings, checkpoint, ranks)
    except UserError as error:
        complaint = str(error)
    complaints = [each.decode() for each in ranks.gather(complaint.encode())]
    for rank, said in enumerate(complaints):
        if said:
            raise UserError(said if rank == 0 else f"rank {rank}: {said}")
    assert engine is not None
    return engine


def _write_together(write: WriteState, writing: Ranks, directory: Path | None = None) -> None:
    """Write this rank's part where rank 0 says; returns when all ranks have, raises UserError when one cannot."""
    told = writing.broadcast(str(directory or "").encode()).decode()
    complaint = ""
    try:
        write(Path(told))
    except OSError as error:
        complaint = f"rank {writing.rank} cannot write its part of a checkpoint: {error}"
    complaints = [each.decode() for each in writing.gather(complaint.encode()) if each]
    if complaints:
        raise UserError(complaints[0])


class LeadingEngine:
    """A TrainEngine: rank 0's, which takes the others along."""

    def __init__(self, engine: TrainEngine, ranks: Ranks, writing: Ranks) -> None:
        self._engine = engine
        self._ranks = ranks
        self._writing = writing

    def __repr__(self) -> str:
        return f"<LeadingEngine of {self._ranks.size} ranks, {self._engine!r}>"

    @property
    def version(self) -> int:
        return self._engine.version

    @property
    def layout(self) -> BatchLayout:
        return self._engine.layout

    def step(self, batch: TrainBatch) -> StepResult:
        _say(self._ranks, Step())
        own, *others = (part_of(batch, rank, self.layout) for rank in range(self._ranks.size))
        self._ranks.scatter([b"", *map(encode_batch, others)])
        return self._engine.step(own)

    def snapshot_tensors(self) -> Iterator[tuple[str, Tensor]]:
        _say(self._ranks, GatherTensors())
        yield from self._engine.snapshot_tensors()

    def base_model_tensors(self) -> Iterator[tuple[str, Tensor]]:
        _say(self._ranks, GatherBaseModel())
        yield from self._engine.base_model_tensors()

    def token_logprobs(self, token_ids_T: np.ndarray) -> np.ndarray:
        _say(self._ranks, TokenLogprobs(tuple(token_ids_T.tolist())))
        return self._engine.token_logprobs(token_ids_T)

    def copy_state(self) -> WriteState:
        _say(self._ranks, CopyState())
        write = self._engine.copy_state()
        return lambda directory: _write_together(write, self._writing, directory)

    def load(self, directory: Path) -> None:
        raise NotImplementedError("the ranks load a checkpoint as they open their engines")

    def export_huggingface(self, directory: Path) -> None:
        _say(self._ranks, Export(str(directory)))
        self._engine.export_huggingface(directory)

    def keep_waiting(self) -> None:
        """To be called now and then while there is nothing to do: so a rank that died is noticed."""
        _say(self._ranks, KeepWaiting())

    def close(self) -> None:
        """The others end."""
        _say(self._ranks, Stop())
