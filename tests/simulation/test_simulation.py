"""What the coordinator promises, in thousands of histories that nobody thought of."""

import subprocess
import sys

import pytest

from tests.simulation.__main__ import main
from tests.simulation.campaign import campaign, examine
from tests.simulation.history import Trained
from tests.simulation.plan import FAULTS, LIES, plan_of
from tests.simulation.world import simulate

HISTORIES = 10_000
WORKERS = 2
DIGEST = "from tests.simulation.campaign import examine; print(examine({seed})[0].digest())"


@pytest.mark.timeout(900)
def test_ten_thousand_histories_keep_every_promise():
    for progress in campaign(0, HISTORIES, workers=WORKERS):
        assert not progress.failures, str(progress.failures[0])
    assert progress.num_done == HISTORIES


@pytest.mark.parametrize("seed", [1, 42])
def test_a_seed_decides_a_history_bit_for_bit(seed):
    once, again = simulate(plan_of(seed)), simulate(plan_of(seed))
    assert once.events == again.events
    command = [sys.executable, "-c", DIGEST.format(seed=seed)]
    environment = {"PYTHONHASHSEED": "7", "PYTHONPATH": "."}
    elsewhere = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=True)
    assert elsewhere.stdout.strip() == once.digest()
    assert once.digest() != simulate(plan_of(seed + 1)).digest()


def test_every_kind_of_fault_and_of_lie_happens_and_runs_get_on_all_the_same():
    plans = [plan_of(seed) for seed in range(200)]
    assert {kind for plan in plans for _, kind in plan.faults} == set(FAULTS)
    assert {lie for plan in plans for server in plan.servers for lie in server.lies} == set(LIES)
    assert {plan.rules.stale_action for plan in plans} == {"wait", "mask", "requeue"}
    steps = [sum(isinstance(event, Trained) for event in examine(seed)[0]) for seed in range(50)]
    assert sum(steps) / len(steps) > 8


def test_a_history_can_be_told(capsys):
    assert main(["--first", "3", "--seeds", "1", "--history"]) == 0
    told = capsys.readouterr().out
    assert "Checkpointed" in told
    assert told.endswith("seed 3: every promise was kept\n")


def test_a_broken_promise_is_told_with_its_seed_and_how_to_see_more(capsys, monkeypatch):
    monkeypatch.setattr("learner.coordinator.batches.Batches.late_after", lambda self, version: None)
    assert main(["--seeds", "20", "--workers", "1"]) == 1
    told = capsys.readouterr().out
    assert "the slowest group is waited for" in told
    assert "python -m tests.simulation --seeds 1 --first" in told
    assert "20 of 20 histories" in told


def test_a_wrong_number_is_told(capsys):
    with pytest.raises(SystemExit):
        main(["--seeds", "0"])
    assert "--seeds and --workers must be at least 1" in capsys.readouterr().err
