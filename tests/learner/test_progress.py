import io
import time

import pytest
from rich.console import Console

from common.messages import CoordinatorStatus, ServerStatus
from learner.progress import REWARD_STEPS, WINDOW_S, Progress, ProgressDisplay, Sample, idle_shares
from learner.training import StepResult


def a_sample(at_s: float, **values) -> Sample:
    defaults = {"waited_s": 0.0, "busy_s": 0.0, "generated_tokens": 0, "num_servers": 1}
    return Sample(at_s=at_s, **(defaults | values))


def a_server(name: str = "node1", **values) -> ServerStatus:
    defaults = {
        "server": name, "loaded_version": 3, "running_groups": 2, "generated_tokens": 100, "busy_s": 1.0,
        "paused_s": 0.0, "silent_s": 0.0, "doing": "generating",
    }  # fmt: skip
    return ServerStatus(**(defaults | values))


def a_status(*servers: ServerStatus, **values) -> CoordinatorStatus:
    defaults = {
        "leased": 4, "running": 2, "queued": 3, "queued_bytes": 1_500_000, "trained": 10, "failed": {},
        "cancelled": {}, "expired": 0, "refused": {}, "waiting_for": "",
    }  # fmt: skip
    return CoordinatorStatus(servers=servers, **(defaults | values))


class Run:
    """What a Progress looks at."""

    def __init__(self, *, version: int = 0) -> None:
        self.waited_s = 0.0
        self.status: CoordinatorStatus | None = None
        self.progress = Progress(
            total_steps=400, queue_groups=8, waited_s=lambda: self.waited_s, status=lambda: self.status, version=version
        )

    def step(self, version: int, reward: float = 0.5) -> None:
        metrics = {"reward": reward, "staleness_mean": 1.25, "staleness_max": 2.0}
        self.progress.step_completed(version, (), StepResult(metrics=metrics))


def test_idle_shares_are_differences_over_the_time_between():
    first = a_sample(10.0, waited_s=1.0, busy_s=5.0, generated_tokens=100, num_servers=2)
    last = a_sample(14.0, waited_s=2.0, busy_s=11.0, generated_tokens=500, num_servers=2)
    assert idle_shares(first, last) == pytest.approx((0.25, 0.25, 100.0))


def test_two_samples_at_one_moment_divide_nothing_by_zero():
    assert idle_shares(a_sample(1.0), a_sample(1.0)) == (0.0, 1.0, 0.0)


def test_a_server_that_left_takes_its_counts_along_and_rates_stay_within_bounds():
    first, last = a_sample(0.0, busy_s=50.0, generated_tokens=900), a_sample(1.0, waited_s=9.0, num_servers=0)
    assert idle_shares(first, last) == (1.0, 1.0, 0.0)


def test_the_values_of_the_display():
    run = Run()
    run.status = a_status(a_server(), a_server("node2", loaded_version=1), failed={"timeout": 2})
    run.step(4)
    run.progress.observe(0.0)
    run.waited_s = 1.0
    run.status = a_status(
        a_server(generated_tokens=2100, busy_s=5.0),
        a_server("node2", loaded_version=1, busy_s=3.0),
        failed={"timeout": 2},
    )
    run.progress.observe(4.0)
    assert run.progress.fields() == {
        "step": "4/400",
        "reward": "0.500",
        "staleness": "1.25 mean, 2 max",
        "tokens/s": "500",
        "idle": "learner 25%, generation 25%",
        "queue": "3/8 groups, 1.5 MB, 2 running",
        "version lag": "node1 -1, node2 -3",
        "failed": "2 timeout",
    }


def test_a_resumed_run_is_shown_at_its_version_before_its_first_step():
    run = Run(version=50)
    run.status = a_status(a_server(loaded_version=50))
    assert run.progress.fields()["step"] == "50/400"
    assert run.progress.fields()["version lag"] == "node1 -0"


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


def test_a_server_without_weights_has_no_lag_and_many_servers_are_summed_up():
    run = Run()
    run.status = a_status(a_server("new", loaded_version=-1), *(a_server(f"n{i}") for i in range(6)))
    run.step(3)
    assert run.progress.fields()["version lag"] == "n0 -0, n1 -0, n2 -0, n3 -0 and 2 more"


def test_outside_a_terminal_lines_are_printed_plainly_and_none_is_repeated():
    run, out = Run(), io.StringIO()
    run.status = a_status(waiting_for="a rollout server [to join]")
    run.progress.observe(time.monotonic())
    with ProgressDisplay(run.progress, Console(file=out, width=40)) as display:
        display.refresh()
        display.refresh()
    assert out.getvalue() == (
        "step 0/400  tokens/s 0  idle learner 0%, generation 100%  queue 3/8 groups, 1.5 MB, 2 running\n"
    )


def test_in_a_terminal_the_panel_says_what_the_learner_waits_for():
    run, out = Run(), io.StringIO()
    run.status = a_status(waiting_for="a rollout server")
    console = Console(file=out, force_terminal=True, width=100)
    with ProgressDisplay(run.progress, console) as display:
        display.refresh()
    assert "waiting for" in out.getvalue()
    assert "a rollout server" in out.getvalue()
