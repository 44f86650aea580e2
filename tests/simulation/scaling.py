"""How the coordinator scales: learner idle, staleness and waste with 1 to 10,000 simulated rollout servers.

The rules are the coordinator's own. Servers sample with long-tailed lengths (log-normal, p99 ten times the median),
follow the published versions in flight, and never fail. Time is virtual.
"""

import argparse
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from tests.simulation.scaling_run import Outcome, Scenario, run

SERVERS = (1, 10, 100, 1_000, 10_000)
ACTIONS = ("wait", "mask", "requeue")

EXAMPLES = """examples:
  python -m tests.simulation.scaling                  the tables, on standard output
  python -m tests.simulation.scaling --plot docs      also docs/scaling.md and docs/scaling.png
  python -m tests.simulation.scaling --servers 1000   one size alone
"""


def equal_capacity(servers: int) -> Scenario:
    """The same 10,000 places for groups, on more and more servers."""
    return Scenario(servers=servers, groups_per_server=10_000 // servers, groups_per_step=5_000, steps=12)


def growing_capacity(servers: int) -> Scenario:
    """Four places a server: what is too little for the learner becomes far too much."""
    return Scenario(servers=servers, groups_per_server=4, groups_per_step=256, steps=12)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.simulation.scaling",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--servers", type=int, nargs="+", default=SERVERS, help="how many (default: 1 to 10,000)")
    parser.add_argument("--plot", type=Path, help="write scaling.md and scaling.png into this folder")
    arguments = parser.parse_args(argv)
    equal = outcomes(map(equal_capacity, arguments.servers))
    growing = outcomes(map(growing_capacity, arguments.servers))
    by_action = outcomes(growing_capacity(100).with_action(action) for action in ACTIONS)
    page = page_of(equal, growing, by_action)
    print(page)
    if arguments.plot is not None:
        from tests.simulation.scaling_plot import draw

        arguments.plot.mkdir(parents=True, exist_ok=True)
        (arguments.plot / "scaling.md").write_text(page)
        draw({"equal capacity": equal, "four groups a server": growing}, arguments.plot / "scaling.png")
    return 0


def outcomes(scenarios: Iterable[Scenario]) -> list[Outcome]:
    found = []
    for scenario in scenarios:
        started_s = time.monotonic()
        found.append(run(scenario))
        print(f"{scenario}: {time.monotonic() - started_s:.1f} s", file=sys.stderr, flush=True)
    return found


COLUMNS = (
    "| servers | groups at a time | groups a step | action | learner idle | places busy | staleness mean | max "
    "| in flight | in queue | tokens never trained | CPU a group |"
)


def table(found: list[Outcome]) -> str:
    """Markdown."""
    rows = [COLUMNS, "|" + "---:|" * (COLUMNS.count("|") - 1)]
    for outcome in found:
        scenario = outcome.scenario
        rows.append(
            f"| {scenario.servers:,} | {scenario.capacity:,} | {scenario.groups_per_step:,} | {scenario.stale_action} "
            f"| {outcome.learner_idle:.1%} | {outcome.places_busy:.0%} | {outcome.staleness:.2f} "
            f"| {outcome.max_staleness} | {outcome.in_flight:.2f} | {outcome.in_queue:.2f} "
            f"| {outcome.never_trained:.2%} | {outcome.cpu_s_per_group * 1e6:.0f} us |"
        )
    return "\n".join(rows)


def page_of(equal: list[Outcome], growing: list[Outcome], by_action: list[Outcome]) -> str:
    scenario = equal[0].scenario
    return f"""# More servers

What `make simulate-scaling` wrote: the coordinator's own rules under a virtual clock, with simulated rollout servers.
A group takes {scenario.median_s:.0f} s in the median, ten times as long at the 99th percentile, and at most
{scenario.max_s:.0f} s; an optimizer step takes {scenario.training_s:.0f} s; max_staleness is {scenario.max_staleness}.
Staleness is the mean over trained tokens, in policy versions, and its two parts: until the group was accepted, and from
then on. Tokens that were never trained are those of leases that were taken away, and those that the action `mask` gives
no gradient. CPU is the coordinator's rules alone, on one core of the machine that wrote this, the heartbeats of all
servers included: with 10,000 servers and 256 groups a step nearly all of it is heartbeats.

Once there are places enough, more servers change nothing: the learner waits for the slowest of the groups that are due,
whose first tokens would be too old after another step. With `wait` nothing that was sampled is lost; the price is the
idle learner, which is the higher the longer the slowest group takes over `max_staleness + 1` steps. `mask` pays with
tokens instead, and `requeue` with both.

![learner idle and staleness over the number of servers](scaling.png)

## The same capacity, on more servers

{table(equal)}

## Four groups a server

{table(growing)}

## What is done about slow groups

{table(by_action)}
"""


if __name__ == "__main__":
    sys.exit(main())
