"""The event log survives crashes, and busy times follow from it alone."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.events import (
    EventLog,
    Intervals,
    busy_share,
    intersect,
    intervals_of,
    length_s,
    merge,
    read_events,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "events-learner.jsonl"


@contextmanager
def a_log(path: Path) -> Iterator[EventLog]:
    with closing(EventLog(path, "learner")) as log:
        yield log


def kinds(path: Path) -> list[str]:
    return [event["kind"] for event in read_events([path])]


def test_an_event_is_one_line_with_time_role_kind_and_fields(path: Path):
    before = time.time()
    with a_log(path) as log:
        log.emit("step", step=3, histogram={"0": 7})
    [line] = path.read_text().splitlines()
    event = json.loads(line)
    assert before <= event.pop("t") <= time.time()
    assert event == {"role": "learner", "kind": "step", "step": 3, "histogram": {"0": 7}}


def test_an_event_can_be_read_the_moment_it_is_emitted(path: Path):
    with a_log(path) as log:
        log.emit("a")
        log.emit("b", text="two\nlines")
        assert kinds(path) == ["a", "b"]


def test_an_interval_says_when_it_began_and_ended_and_takes_fields_found_on_the_way(path: Path):
    before = time.time()
    with a_log(path) as log, log.interval("publish", version=4) as fields:
        between = time.time()
        fields["num_bytes"] = 12
    [event] = read_events([path])
    assert before <= event["t"] <= between <= event["t_end"] <= time.time()
    assert (event["version"], event["num_bytes"]) == (4, 12)


def test_an_interval_ends_also_by_an_error(path: Path):
    with a_log(path) as log, pytest.raises(KeyError), log.interval("train"):
        raise KeyError
    assert kinds(path) == ["train"]


def test_events_of_several_processes_are_ordered_by_their_start(tmp_path: Path):
    for name, times in {"a": (1.0, 4.0), "b": (2.0, 3.0)}.items():
        lines = [json.dumps({"t": t, "role": name, "kind": "x"}) for t in times]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    events = read_events([tmp_path / "a", tmp_path / "b"])
    assert [event["t"] for event in events] == [1.0, 2.0, 3.0, 4.0]


def crash_while_writing(path: Path, keep: Callable[[int], int]) -> None:
    """Two events, of the second of which only some bytes reach the disk."""
    with a_log(path) as log:
        log.emit("first")
        size = path.stat().st_size
        log.emit("second", note="schön")
    content = path.read_bytes()
    path.write_bytes(content[: size + keep(len(content) - size)])


@pytest.mark.parametrize(
    "keep", [lambda _: 1, lambda n: n // 2, lambda n: n - 2], ids=["one byte", "half", "nearly all"]
)
def test_a_line_torn_by_a_crash_is_left_out_also_when_the_process_went_on_later(path: Path, keep: Callable[[int], int]):
    crash_while_writing(path, keep)
    assert kinds(path) == ["first"]
    with a_log(path):
        pass
    assert kinds(path) == ["first"]
    with a_log(path) as log:
        log.emit("third")
    assert kinds(path) == ["first", "third"]


def test_a_line_that_lacks_nothing_but_its_end_is_an_event(path: Path):
    crash_while_writing(path, lambda n: n - 1)
    assert kinds(path) == ["first", "second"]
    with a_log(path) as log:
        log.emit("third")
    assert kinds(path) == ["first", "second", "third"]


def test_a_log_that_was_closed_well_goes_on_without_an_empty_line(path: Path):
    for kind in ("first", "second"):
        with a_log(path) as log:
            log.emit(kind)
    assert len(path.read_text().splitlines()) == 2


GOOD = b'{"t":1.0,"role":"learner","kind":"step"}\n'


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (GOOD + b"garbage\n" + GOOD, 2),
        (GOOD + b"garbage\n", 2),
        (b'{"t":1.0\n' + GOOD, 1),
        (GOOD + b"\xff\xfe\n" + GOOD, 2),
        (GOOD + b"17\n" + GOOD, 2),
        (b'{"role":"learner","kind":"step"}\n' + GOOD, 1),
    ],
    ids=["in the middle", "a whole last line", "torn but not sealed", "not text", "not an object", "without a time"],
)
def test_garbage_is_an_error_that_names_file_and_line(path: Path, content: bytes, line: int):
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path}:{line} is not an event"):
        read_events([path])


def test_merging_joins_what_touches_and_leaves_out_what_is_empty():
    assert merge([(5, 6), (0, 2), (1, 3), (3, 4), (8, 8), (9, 7), (0, 1)]) == [(0, 4), (5, 6)]


def test_one_of_kind_busy_counts_overlapping_intervals_once_and_only_within_the_window():
    events = [
        {"t": 0.0, "t_end": 4.0, "kind": "generate"},
        {"t": 2.0, "t_end": 6.0, "kind": "generate"},
        {"t": 9.0, "t_end": 20.0, "kind": "generate"},
        {"t": 0.0, "t_end": 20.0, "kind": "train"},
        {"t": 7.0, "kind": "generate"},
    ]
    assert intervals_of(events, "generate") == [(0.0, 6.0), (9.0, 20.0)]
    assert busy_share(events, "generate", 2.0, 10.0) == (4.0 + 1.0) / 8.0
    assert busy_share(events, "publish", 2.0, 10.0) == 0.0


some_intervals = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=12)


def moments(intervals: Intervals) -> set[int]:
    return {moment for start, end in intervals for moment in range(int(start), int(end))}


@given(first=some_intervals, second=some_intervals)
def test_merge_intersect_and_length_are_those_of_the_sets_of_moments(first: Intervals, second: Intervals):
    merged = merge(first)
    assert moments(merged) == moments(first)
    assert length_s(merged) == len(moments(first))
    assert all(before[1] < after[0] for before, after in pairwise(merged))
    both = intersect(merged, merge(second))
    assert moments(both) == moments(first) & moments(second)
    assert both == sorted(both)
    assert length_s(both) == len(moments(first) & moments(second))
