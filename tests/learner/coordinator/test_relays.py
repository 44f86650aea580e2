"""RelayTree: from whom each server pulls, while servers come and go."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.coordinator.relays import RelayServer, RelayTree


def a_relay(number: int, **changes: object) -> RelayServer:
    fields = {"server_id": f"s{number}", "address": f"tcp://h{number}:1", "relay_key": b"r%d" % number, "own_key": b""}
    return RelayServer(**fields | changes)  # type: ignore[arg-type]


def relays(*numbers: int) -> list[RelayServer]:
    return [a_relay(number) for number in numbers]


def sources(tree: RelayTree, servers: list[RelayServer]) -> dict[str, str | None]:
    plans = tree.plans(servers)
    return {server: plan.source.server if plan.source is not None else None for server, plan in plans.items()}


def test_the_learner_and_each_server_serve_so_many_and_the_places_near_the_learner_fill_first():
    tree = RelayTree(2)
    assert sources(tree, relays(*range(8))) == {
        "s0": None, "s1": None, "s2": "s0", "s3": "s0", "s4": "s1", "s5": "s1", "s6": "s2", "s7": "s2",
    }  # fmt: skip
    plans = tree.plans(relays(*range(8)))
    assert [plans[f"s{number}"].source.level for number in (2, 5, 6)] == [1, 1, 2]
    assert (plans["s5"].source.address, plans["s5"].source.key) == ("tcp://h1:1", b"r1")


def test_whoever_has_a_place_keeps_it_when_others_leave_and_the_orphans_get_the_free_ones():
    tree = RelayTree(2)
    before = sources(tree, relays(*range(8)))
    after = sources(tree, relays(0, 2, 3, 4, 5, 6, 7))
    assert {server: source for server, source in after.items() if source != before[server]} == {"s4": None, "s5": "s4"}


def test_a_server_that_comes_back_is_placed_as_if_it_were_new():
    tree = RelayTree(2)
    tree.plans(relays(*range(8)))
    tree.plans(relays(0, 2, 3, 4, 5, 6, 7))
    assert sources(tree, relays(*range(8)))["s1"] == "s4"


def test_a_relay_lets_in_the_keys_of_those_who_pull_from_it_and_no_other():
    servers = [a_relay(number, own_key=bytes([65 + number // 2]) * 32) for number in range(8)]
    plans = RelayTree(2).plans(servers)
    assert plans["s0"].admitted == (b"B" * 32,)  # of s2 and s3, who share it
    assert plans["s2"].admitted == (b"D" * 32,)
    assert plans["s7"].admitted == ()


def test_an_address_that_changes_is_told_to_those_who_pull_there():
    tree = RelayTree(2)
    servers = relays(*range(4))
    tree.plans(servers)
    servers[0] = a_relay(0, address="tcp://elsewhere:2")
    plans = tree.plans(servers)
    assert {plans[server].source.address for server in ("s2", "s3")} == {"tcp://elsewhere:2"}


@given(fan_out=st.integers(2, 4), memberships=st.lists(st.sets(st.integers(0, 30), max_size=20), max_size=8))
def test_every_server_reaches_the_learner_over_servers_that_are_there_and_nobody_serves_more_than_it_may(
    fan_out: int, memberships: list[set[int]]
):
    tree = RelayTree(fan_out)
    for members in memberships:
        servers = relays(*sorted(members))
        found, plans = sources(tree, servers), tree.plans(servers)
        assert set(found) == {server.server_id for server in servers}
        assert max(Counter(found.values()).values(), default=0) <= fan_out
        for server in found:
            path = [server]
            while (source := found[path[-1]]) is not None:
                path.append(source)
                assert len(path) <= len(servers)
            assert len(path) == 1 or plans[server].source.level == len(path) - 1


@pytest.mark.parametrize(("servers", "deepest"), [(32, 0), (1_000, 1), (1_056, 1), (5_000, 2)])
def test_a_large_fleet_is_not_deep(servers: int, deepest: int):
    plans = RelayTree(32).plans(relays(*range(servers)))
    assert max(plan.source.level if plan.source is not None else 0 for plan in plans.values()) == deepest
