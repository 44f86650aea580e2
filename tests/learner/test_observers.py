from common.events import EventLog, read_events
from learner.observers import StepLog, staleness_histogram
from learner.training import StepResult
from tests.builders_learner import a_group, a_trajectory


class TrackerTwin:
    def __init__(self) -> None:
        self.seen: list[tuple[int, dict[str, float]]] = []

    def log(self, step: int, scalars) -> None:
        self.seen.append((step, dict(scalars)))

    def close(self) -> None: ...


def test_the_histogram_counts_sampled_tokens_by_their_age():
    groups = [
        a_group(a_trajectory((0, 1, 1, 0, 1), versions=[3, 4, 5]), a_trajectory((0, 1), versions=5)),
        a_group(a_trajectory((0, 0, 1, 1), versions=[4, 4])),
    ]
    assert staleness_histogram(groups, 5) == {"0": 2, "1": 3, "2": 1}


def test_a_step_is_written_with_the_ages_its_tokens_had_when_they_were_trained(tmp_path):
    log, tracker = EventLog(tmp_path / "events.jsonl", "learner"), TrackerTwin()
    groups = (a_group(a_trajectory((0, 1, 1), versions=[4, 5])),)
    StepLog(log, [tracker]).step_completed(6, groups, StepResult(metrics={"reward": 0.5}))  # it updated version 5
    log.close()
    [event] = read_events([tmp_path / "events.jsonl"])
    assert (event["kind"], event["step"], event["reward"]) == ("step", 6, 0.5)
    assert event["staleness_histogram"] == {"0": 1, "1": 1}
    assert tracker.seen == [(6, {"reward": 0.5})]
