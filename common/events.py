"""EventLog: what a process did and when, as JSON lines, so that busy and idle times can be computed afterwards.

One line per event: {"t": unix seconds, "role": ..., "kind": ..., ...}; an interval also has "t_end".
"""

import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Event = dict[str, Any]
Intervals = list[tuple[float, float]]


class EventLog:
    """Appends to one file of its own; a whole line per write, so that a crash tears the last line at most."""

    def __init__(self, path: Path, role: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_torn = _is_torn(path)
        self._file = path.open("a", buffering=1, encoding="utf-8")
        self._role = role
        self._file.write("\n\n" if is_torn else "")  # the empty line tells a reader why the line before it is none

    def close(self) -> None:
        self._file.close()

    def emit(self, kind: str, **fields: Any) -> None:
        self._write({"t": time.time(), "role": self._role, "kind": kind, **fields})

    def record(self, kind: str, start: float, end: float, **fields: Any) -> None:
        """An interval that is over, [start, end) in unix seconds."""
        self._write({"t": start, "t_end": end, "role": self._role, "kind": kind, **fields})

    @contextmanager
    def interval(self, kind: str, **fields: Any) -> Iterator[dict[str, Any]]:
        """Records the time the block took, also when it raises; fields may be added to what is yielded."""
        start = time.time()
        try:
            yield fields
        finally:
            self.record(kind, start, time.time(), **fields)

    def _write(self, event: Event) -> None:
        self._file.write(json.dumps(event, separators=(",", ":")) + "\n")


def _is_torn(path: Path) -> bool:
    """Whether a crash left the last line unfinished."""
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def read_events(paths: Iterable[Path]) -> list[Event]:
    """Events of several logs, by start time. A line torn by a crash is left out; anything else raises ValueError."""
    events: list[Event] = []
    for path in paths:
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                if line:
                    events.append(_event(line))
            except ValueError as error:
                # Torn: nothing follows, or the seal of the process that went on; the end of the file is no seal.
                is_torn = number == len(lines) or (lines[number] == b"" and number + 1 < len(lines))
                if not is_torn:
                    raise ValueError(f"{path}:{number} is not an event: {error}") from error
    return sorted(events, key=lambda event: event["t"])


def _event(line: bytes) -> Event:
    event = json.loads(line)
    if not isinstance(event, dict) or not {"t", "role", "kind"} <= event.keys():
        raise ValueError('an event is an object with "t", "role" and "kind"')
    return event


def intervals_of(events: Iterable[Event], kind: str) -> Intervals:
    """When intervals of this kind were running, of one process or of several."""
    return merge([(event["t"], event["t_end"]) for event in events if event["kind"] == kind and "t_end" in event])


def merge(intervals: Intervals) -> Intervals:
    """The same set of moments as disjoint intervals, in order."""
    merged: Intervals = []
    for start, end in sorted(intervals):
        if start >= end:
            continue  # no moment lies in it; the clock was set back, or did not tick
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def intersect(first: Intervals, second: Intervals) -> Intervals:
    """Moments that lie in both; each argument disjoint and in order, as merge() returns it."""
    both: Intervals = []
    i = j = 0
    while i < len(first) and j < len(second):
        start, end = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if start < end:
            both.append((start, end))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return both


def length_s(intervals: Intervals) -> float:
    return sum(end - start for start, end in intervals)


def busy_share(events: Iterable[Event], kind: str, start: float, end: float) -> float:
    """Share of [start, end) in which an interval of this kind was running."""
    return length_s(intersect(intervals_of(events, kind), [(start, end)])) / (end - start)
