"""Every number a step reports has a name that is explained, and arrives in events, at trackers and at Prometheus."""

import math
from urllib.request import urlopen

import pytest

from common.events import EventLog, read_events
from common.metrics import PREFIX, start_metrics_server
from learner.algorithms import CORRECTIONS
from learner.observers import StepLog
from learner.refusals import Refusals
from learner.refused_batches import RefusedBatches
from learner.reward_settings import KlSettings, RewardSettings
from learner.step_metrics import STEP_METRICS, StepMeter
from learner.torch_engine import open_torch_engine
from learner.training import StepResult
from tests.builders_learner import random_groups, some_train_settings, train
from tests.models import save_tiny_model

HEALTH = {
    "mismatch_k1", "mismatch_k3", "staleness_k1", "staleness_k3", "effective_sample_share", "clip_fraction",
    "masked_fraction", "entropy", "advantage_std", "grad_norm", "explained_variance", "length_mean", "truncated",
}  # fmt: skip
"""What tells a healthy run from a dying one."""


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[StepResult]:
    """The second steps of two engines that have, between them, everything that reports something."""
    model = str(save_tiny_model(tmp_path_factory.mktemp("models") / "tied", tied=True))
    one = some_train_settings(
        model, critic_model=model, advantage="gae", entropy_coefficient=0.1, corrections=sorted(CORRECTIONS),
        kl=KlSettings(coefficient=0.1, reference_model=model, target=1.0),
        rewards=RewardSettings(overlong_buffer=2, overlong_length=8, clip=1.0),
    )  # fmt: skip
    other = some_train_settings(model, rewards=RewardSettings(drop_equal_groups=True))
    return [train(open_torch_engine(settings), steps=2)[-1] for settings in (one, other)]


def test_every_number_is_explained_and_nothing_is_that_does_not_exist(results):
    assert {name for result in results for name in result.metrics} == STEP_METRICS.keys()


def test_what_tells_a_healthy_run_from_a_dying_one_is_among_them(results):
    for name in HEALTH:
        assert [result for result in results if math.isfinite(result.metrics.get(name, math.nan))], name


class TrackerTwin:
    def __init__(self) -> None:
        self.seen: dict[str, float] = {}

    def log(self, step: int, scalars) -> None:
        self.seen = dict(scalars)

    def close(self) -> None: ...


def test_events_trackers_and_prometheus_are_told_all_of_them(results, tmp_path):
    log, tracker = EventLog(tmp_path / "events.jsonl", "learner"), TrackerTwin()
    refusals = Refusals(RefusedBatches(tmp_path / "refused"), log, on_nonfinite="skip", max_skipped_steps=3)
    meter = StepMeter(refusals)
    for observer in (StepLog(log, [tracker]), meter):
        observer.step_completed(2, random_groups(0), results[0])
    log.close()
    [event] = read_events([tmp_path / "events.jsonl"])
    with start_metrics_server("127.0.0.1:0", meter.measure) as address, urlopen(f"http://{address}/metrics") as page:
        lines = page.read().decode().splitlines()
    scraped = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    for name, value in results[0].metrics.items():
        assert event[name] == value
        assert tracker.seen[name] == value
        assert float(scraped[f"{PREFIX}step_{name}"]) == pytest.approx(value)
    assert scraped[f"{PREFIX}steps_skipped_total"] == "0.0"
