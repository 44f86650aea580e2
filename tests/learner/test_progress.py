import io
import sys
import time

import msgspec
import pytest
from rich.console import Console

from learner.coordinator.messages import CoordinatorStatus, ServerStatus
from learner.progress import REWARD_STEPS, WINDOW_S, Progress, ProgressDisplay
from learner.rates import FleetTotals, Rates, Sample, describe_bytes
from learner.snapshot_messages import SnapshotReady
from learner.training import StepResult


def a_server(name: str = "node1", **values) -> ServerStatus:
    defaults = {
        "server": name, "loaded_version": 3, "running_groups": 2, "generated_tokens": 100, "busy_s": 1.0,
        "paused_s": 0.0, "silent_s": 0.0, "doing": "generating",
    }  # fmt: skip
    return ServerStatus(**(defaults | values))


def a_status(*servers: ServerStatus, **values) -> CoordinatorStatus:
    defaults = {
        "leased": 4, "running": 2, "queued": 3, "queued_bytes": 1_500_000, "trained": 10, "failed": {},
        "cancelled": {}, "expired": 0, "refused": {}, "waiting_for": "", "depth": 8,
            "staleness_tokens": {}, "in_flight_tokens": {}, "in_queue_tokens": {},
    }  # fmt: skip
    return CoordinatorStatus(servers=servers, **(defaults | values))


class Run:
    """What a Progress looks at."""

    def __init__(self, *, version: int = 0) -> None:
        self.waited_s = 0.0
        self.status: CoordinatorStatus | None = None
        self.published: SnapshotReady | None = None
        self.progress = Progress(
            total_steps=400, queue_groups=8, waited_s=lambda: self.waited_s, status=lambda: self.status,
            version=version, published=lambda: self.published,
        )  # fmt: skip

    def step(self, version: int, reward: float = 0.5) -> None:
        metrics = {"reward": reward, "staleness_mean": 1.25, "staleness_max": 2.0, "trained_tokens": 800.0}
        self.progress.step_completed(version, (), StepResult(metrics=metrics))


def test_rates_are_differences_over_the_time_between():
    first = Sample(at_s=10.0, waited_s=1.0, server_s=20.0, busy_s=5.0, paused_s=1.0, generated_tokens=100)
    last = Sample(
        at_s=14.0, waited_s=2.0, server_s=28.0, busy_s=11.0, paused_s=1.8, generated_tokens=500, trained_tokens=200.0
    )
    rates = Rates(first, last)
    assert (rates.learner_idle, rates.generation_idle) == pytest.approx((0.25, 0.25))
    assert rates.paused == pytest.approx(0.1)
    assert (rates.generated_tokens_per_s, rates.trained_tokens_per_s) == pytest.approx((100.0, 50.0))


def test_without_time_or_servers_nothing_is_divided_by_zero_and_shares_stay_within_bounds():
    rates = Rates(Sample(at_s=1.0), Sample(at_s=1.0, waited_s=9.0))
    assert (rates.learner_idle, rates.generation_idle, rates.paused, rates.generated_tokens_per_s) == (
        1.0,
        1.0,
        0.0,
        0.0,
    )


def test_each_server_counts_from_when_it_was_first_seen_until_it_leaves():
    fleet = FleetTotals()
    fleet.observe([a_server("old", busy_s=500.0, generated_tokens=90_000)], 0.0)
    fleet.observe([a_server("old", busy_s=501.0, generated_tokens=90_100), a_server("new", busy_s=70.0)], 2.0)
    assert (fleet.server_s, fleet.busy_s, fleet.generated_tokens) == (2.0, 1.0, 100)
    fleet.observe([a_server("new", busy_s=71.5, paused_s=0.5)], 2.0)
    assert (fleet.server_s, fleet.busy_s, fleet.paused_s) == (4.0, 2.5, 0.5)
    fleet.observe([], 2.0)
    assert fleet.server_s == 4.0


@pytest.mark.parametrize("counter", ["busy_s", "paused_s", "generated_tokens"])
def test_a_server_that_started_again_takes_nothing_back(counter: str):
    fleet = FleetTotals()
    fleet.observe([a_server(busy_s=50.0, paused_s=5.0, generated_tokens=900)], 0.0)
    again = a_server(**({"busy_s": 60.0, "paused_s": 6.0, "generated_tokens": 1000} | {counter: 0}))
    fleet.observe([again], 1.0)
    assert (fleet.server_s, fleet.busy_s, fleet.paused_s, fleet.generated_tokens) == (0.0, 0.0, 0.0, 0)


def test_a_server_that_is_still_starting_is_not_idle():
    fleet = FleetTotals()
    for _ in range(3):
        fleet.observe([a_server(loaded_version=-1, busy_s=0.0, generated_tokens=0)], 1.0)
    assert fleet.server_s == 0.0


def test_the_values_of_the_display():
    run = Run()
    run.status = a_status(a_server(), a_server("node2", loaded_version=1), failed={"timeout": 2})
    run.step(4)
    run.progress.observe(0.0)
    run.step(5)
    run.waited_s = 1.0
    run.status = a_status(
        a_server(generated_tokens=2100, busy_s=5.0, paused_s=0.04, updates=4, pulled_bytes=6_000),
        a_server("node2", loaded_version=1, busy_s=3.0),
        failed={"timeout": 2, "hung": 0},
        cancelled={"equal_rewards": 7, "restart": 1},
        waiting_for="server node1",
    )
    run.progress.observe(4.0)
    assert run.progress.fields() == {
        "step": "5/400",
        "reward": "0.500",
        "staleness": "1.25 mean, 2 max",
        "tokens/s": "500 sampled, 200 trained",
        "idle": "learner 25%, generation 25%",
        "updates": "10 ms a version, 1.5 kB pulled; pause generation 0.5%",
        "queue": "3/8 groups, 1.5 MB, 2 running",
        "servers": "node1 2 behind, node2 4 behind",
        "failed": "2 timeout",
        "filtered": "7 groups of equal rewards",
        "waiting for": "server node1",
    }


def test_what_is_shared_is_not_said_to_be_pulled_and_what_was_published_is_said_with_its_bytes():
    run = Run()
    run.published = SnapshotReady(
        version=7, full_bytes=1_217_000, delta_bytes=1_290, encode_s=0.1, overtaken_versions=0, full_pulls={}
    )
    for now_s in (0.0, 4.0):
        run.status = a_status(a_server(updates=int(now_s), paused_s=now_s / 100))
        run.progress.observe(now_s)
    assert run.progress.fields()["updates"] == "10 ms a version, through shared memory; pause generation 1.0%"
    assert run.progress.fields()["weights"] == "version 7, delta of 1.3 kB, in full 1.2 MB"
    run.published = msgspec.structs.replace(run.published, delta_bytes=None)
    assert run.progress.fields()["weights"] == "version 7, 1.2 MB, no delta"


def test_a_server_out_of_service_is_shown_with_its_reason():
    run = Run()
    run.status = a_status(a_server(), a_server("node2", out_of_service="its weights are wrong"))
    assert run.progress.fields()["out of service"] == "node2: its weights are wrong"


@pytest.mark.parametrize(
    ("num_bytes", "words"), [(0, "0 B"), (999, "999 B"), (1_290, "1.3 kB"), (2.5e6, "2.5 MB"), (140e9, "140.0 GB")]
)
def test_bytes_are_said_in_units_that_a_person_reads(num_bytes, words):
    assert describe_bytes(num_bytes) == words


def test_a_resumed_run_is_shown_at_its_version_before_its_first_step():
    run = Run(version=50)
    run.status = a_status(a_server(loaded_version=50))
    assert run.progress.fields()["step"] == "50/400"
    assert run.progress.fields()["servers"] == "node1 current"


def test_the_reward_shown_is_the_mean_over_the_last_steps():
    run = Run()
    for version in range(2 * REWARD_STEPS):
        run.step(version, reward=float(version >= REWARD_STEPS))
    assert run.progress.fields()["reward"] == "1.000"


def test_rates_are_of_the_last_seconds_and_not_of_the_whole_run():
    run = Run()
    for second in range(100):
        run.waited_s = min(float(second), 50.0)  # waited half of the run, but not lately
        run.progress.observe(float(second))
    assert WINDOW_S < 49
    assert "learner 0%" in run.progress.fields()["idle"]


def test_a_server_without_weights_is_starting_and_many_servers_are_summed_up():
    run = Run()
    run.status = a_status(a_server("new", loaded_version=-1), *(a_server(f"n{i}") for i in range(6)))
    run.step(3)
    assert run.progress.fields()["servers"] == "new starting, n0 current, n1 current, n2 current and 3 more"


def test_outside_a_terminal_lines_are_printed_plainly_and_none_is_repeated():
    run, out = Run(), io.StringIO()
    run.status = a_status(waiting_for="a rollout server [to join]")
    run.progress.observe(time.monotonic())
    with ProgressDisplay(run.progress, Console(file=out, width=40)) as display:
        display.refresh()
        display.refresh()
    assert out.getvalue() == (
        "step 0/400  tokens/s 0 sampled, 0 trained  idle learner 0%, generation 100%  updates pause generation 0.0%  "
        "queue 3/8 groups, 1.5 MB, 2 running\n"
    )


def shown(run: Run, *, is_terminal: bool = True) -> str:
    """What a terminal, or a file, is sent."""
    out = io.StringIO()
    with ProgressDisplay(run.progress, Console(file=out, force_terminal=is_terminal, width=100)) as display:
        display.refresh()
    return out.getvalue()


def test_in_a_terminal_the_panel_says_what_the_learner_waits_for():
    run = Run()
    run.status = a_status(waiting_for="a rollout server")
    panel = shown(run)
    assert "waiting for" in panel
    assert "a rollout server" in panel


@pytest.mark.parametrize("is_terminal", [True, False])
def test_what_others_call_themselves_is_shown_as_it_is(is_terminal: bool):
    run = Run()
    run.status = a_status(a_server("node[/]"), failed={"[red]": 1}, waiting_for="tasks [bold]")
    text = shown(run, is_terminal=is_terminal)
    assert "node[/] current" in text
    assert "1 [red]" in text
    assert ("tasks [bold]" in text) == is_terminal


@pytest.mark.parametrize("is_terminal", [True, False])
def test_log_lines_go_above_the_panel_unless_they_are_sent_to_a_file(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch
):
    errors, out = io.StringIO(), io.StringIO()
    monkeypatch.setattr(errors, "isatty", lambda: is_terminal)
    monkeypatch.setattr(sys, "stderr", errors)
    with ProgressDisplay(Run().progress, Console(file=out, force_terminal=True)):
        sys.stderr.write("a server joined\n")
    assert ("a server joined" in out.getvalue()) == is_terminal
    assert ("a server joined" in errors.getvalue()) != is_terminal
