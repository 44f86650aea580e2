"""The real coordinator process, with its journal or, as the control, with one that keeps nothing.

`python -m tests.benchmarks.dataplane_coordinator durable|volatile SETTINGS.json`. The rest is `python -m
learner.coordinator`, line by line.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from unittest import mock

from common.messages import GroupHeader
from learner.coordinator import __main__ as coordinator
from learner.coordinator.journal import Record
from learner.coordinator.ledger import PastLeases
from learner.coordinator.recovery import JournalContents


class VolatileJournal:
    """Takes what Journal takes, and forgets it at once: what remains is the price of everything but the disk."""

    def __init__(self, path: Path, *, lineage: str) -> None:
        self.lineage_before = ""

    def contents(self) -> JournalContents:
        return JournalContents()

    def commit(self, records: Iterable[Record], past: PastLeases) -> None:
        pass

    def read(self, lease_ids: Sequence[int]) -> dict[int, tuple[GroupHeader, bytes]]:
        assert not lease_ids, "what was never written cannot be read"
        return {}

    def clear(self) -> None:
        pass

    def close(self) -> None:
        pass


def main() -> int:
    journal, sys.argv[1:] = sys.argv[1], sys.argv[2:]
    if journal == "durable":
        return coordinator.main()
    with mock.patch("learner.coordinator.journal_keeper.Journal", VolatileJournal):
        return coordinator.main()


if __name__ == "__main__":
    sys.exit(main())
