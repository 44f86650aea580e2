"""What Prometheus is told of a learner and, through its coordinator's status, of the whole run."""

from collections.abc import Iterator
from typing import get_args

from common.metrics import Measurement
from learner.coordinator.bounds import Bound
from learner.coordinator.client import CoordinatorClient
from learner.coordinator.messages import CoordinatorStatus
from learner.publisher import Publisher
from learner.training import TrainEngine


def measure(engine: TrainEngine, publisher: Publisher, coordinator: CoordinatorClient) -> Iterator[Measurement]:
    yield Measurement(name="policy_version", value=engine.version, help="optimizer steps completed")
    yield Measurement(name="published_version", value=publisher.published_version, help="newest snapshot served")
    yield Measurement(name="skipped_versions_total", value=publisher.skipped_versions, help="never published")
    yield from _snapshots(publisher)
    yield Measurement(name="batch_wait_seconds_total", value=coordinator.waited_s, help="the learner had no batch")
    if coordinator.status is not None:
        yield from measure_run(coordinator.status)


def _snapshots(publisher: Publisher) -> Iterator[Measurement]:
    newest = publisher.newest
    if newest is None:
        return
    yield Measurement(name="snapshot_bytes", value=newest.full_bytes, help="of a full snapshot")
    yield Measurement(name="delta_bytes", value=newest.delta_bytes or 0, help="of the newest delta; 0 where it is none")
    for why, count in newest.full_pulls.items():
        yield Measurement(
            name="full_pulls_total", value=count, help="full snapshots offered to servers", labels={"why": str(why)}
        )


def measure_run(status: CoordinatorStatus) -> Iterator[Measurement]:
    """What the coordinator says of the run: its groups, who waits for whom, and the rollout servers."""
    for state in ("leased", "running", "queued", "trained", "expired"):
        yield Measurement(name=f"groups_{state}", value=getattr(status, state), help="groups of this run, by state")
    for state in ("failed", "cancelled", "refused"):
        for reason, count in getattr(status, state).items():
            yield Measurement(
                name=f"groups_{state}", value=count, help="groups of this run, by reason", labels={"reason": reason}
            )
    yield Measurement(name="queue_bytes", value=status.queued_bytes, help="bytes of queued groups")
    yield Measurement(name="lease_depth", value=status.depth, help="groups that may be open at once, as it adapts")
    yield from _waits(status)
    yield from _token_ages(status)
    for server in status.servers:
        labels = {"server": server.server}
        yield Measurement(name="server_version", value=server.loaded_version, help="weights it has", labels=labels)
        yield Measurement(
            name="server_running_groups", value=server.running_groups, help="leases it has", labels=labels
        )
        yield Measurement(
            name="server_out_of_service", value=bool(server.out_of_service), help="1: as it says", labels=labels
        )
        yield Measurement(name="server_silent_seconds", value=server.silent_s, help="since last heard", labels=labels)


def _waits(status: CoordinatorStatus) -> Iterator[Measurement]:
    for bound in get_args(Bound):
        yield Measurement(
            name="servers_wait_for_learner",
            value=status.held_by == bound,
            help="1 while this bound keeps leases from all servers until the learner has trained more",
            labels={"bound": bound},
        )
    yield Measurement(
        name="learner_waits_for_servers", value=bool(status.waiting_for), help="1 while there is no complete batch"
    )


def _token_ages(status: CoordinatorStatus) -> Iterator[Measurement]:
    for name, what in (
        ("staleness", "age of trained tokens in policy versions"),
        ("in_flight", "the part of it until their group was accepted"),
        ("in_queue", "the part of it from then on"),
    ):
        for age, count in sorted(getattr(status, f"{name}_tokens").items()):
            yield Measurement(name=f"tokens_by_{name}_total", value=count, help=what, labels={"versions": str(age)})
