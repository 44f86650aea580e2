"""Who is told from whom it pulls weights, and when, by a coordinator over real ZeroMQ."""

from contextlib import AsyncExitStack

import pytest

from common.keys import ensure_client_key, ensure_server_keys, load_client_key, revoke_key
from common.messages import Pulse, RelayPlace, RelayPlan, Welcome
from common.wire import curve_keypair
from learner.coordinator import service as service_module
from tests.builders_coordinator import a_heartbeat, a_hello, a_ready, some_settings
from tests.builders_coordinator_service import Party, a_coordinator_serving, a_server, settings_in

DIRECT = RelayPlan(source=None, admitted=())


@pytest.fixture(autouse=True)
def frequent_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "TICK_S", 0.05)


async def offer(server: Party, name: str, **changes: object) -> None:
    await server.say(a_heartbeat(relay_address=f"tcp://{name}:1", relay_key=name.encode() * 32, **changes))


def place(name: str, level: int = 1) -> RelayPlace:
    return RelayPlace(server=name, address=f"tcp://{name}:1", key=name.encode() * 32, level=level)


async def until(server: Party, plan: RelayPlan) -> None:
    while await server.expect(RelayPlan) != plan:
        pass


async def test_servers_that_offer_to_give_weights_on_are_told_where_to_pull_and_those_that_do_not_are_told_nothing(
    tmp_path,
):
    async with a_coordinator_serving(settings_in(tmp_path, relay_weights=2)) as (_, address), AsyncExitStack() as stack:
        a, b, c, d = [
            await stack.enter_async_context(a_server(address, epoch=f"epoch-{name}", name=name)) for name in "abcd"
        ]
        for server, name in ((a, "a"), (b, "b"), (c, "c")):
            await offer(server, name)
            await until(server, RelayPlan(source=place("a") if name == "c" else None, admitted=()))
        await offer(a, "a", out_of_service="its canary failed")
        await until(c, DIRECT)
        await offer(d, "d")
        await until(d, RelayPlan(source=place("b"), admitted=()))
        await offer(a, "a")
        await until(a, RelayPlan(source=place("b"), admitted=()))


async def test_a_relay_that_sent_wrong_weights_is_named_once_where_the_operator_looks(tmp_path, caplog):
    settings = settings_in(tmp_path, relay_weights=2)
    async with a_coordinator_serving(settings) as (_, address), a_server(address, name="b") as server:
        for _ in range(3):
            await offer(server, "b", lying_relay="node-7")
            await server.expect(Pulse)
    said = [record.message for record in caplog.records if "wrong weights" in record.message]
    assert len(said) == 1
    assert said[0].startswith("server b was sent wrong weights by the relay of node-7, refused them and pulls from the")


async def test_a_server_that_comes_back_over_another_connection_is_told_again(tmp_path):
    async with a_coordinator_serving(settings_in(tmp_path, relay_weights=2)) as (_, address):
        for _ in range(2):
            async with a_server(address) as server:
                await offer(server, "a")
                await until(server, DIRECT)


async def test_nobody_is_sent_to_a_server_that_was_not_heard_of_for_a_while(tmp_path):
    settings = settings_in(
        tmp_path, relay_weights=2, rules=some_settings(notice_timeout_s=0.5, server_timeout_s=1000.0)
    )
    async with a_coordinator_serving(settings) as (_, address), AsyncExitStack() as stack:
        servers = {
            name: await stack.enter_async_context(a_server(address, epoch=f"epoch-{name}", name=name)) for name in "abc"
        }
        for name, server in servers.items():
            await offer(server, name)
            await server.expect(RelayPlan)
        plan = RelayPlan(source=place("a"), admitted=())
        while plan != DIRECT:
            for name in "bc":
                await offer(servers[name], name)
            heard = await servers["c"].everything_until(Pulse)
            plan = next((each for each in heard if isinstance(each, RelayPlan)), plan)


async def test_where_the_run_does_not_relay_nobody_is_told_anything(tmp_path):
    async with a_coordinator_serving(settings_in(tmp_path)) as (_, address), a_server(address, join=False) as server:
        assert (await server.ask(a_hello(), Welcome)).relay_weights == 0
        await server.say(a_ready())
        await offer(server, "a")
        for _ in range(5):
            assert RelayPlan not in map(type, await server.everything_until(Pulse))
            await offer(server, "a")


async def test_a_relay_lets_in_the_keys_that_its_pullers_showed_until_one_is_revoked(tmp_path):
    keys = ensure_server_keys(tmp_path / "keys", curve_keypair)
    own = {name: load_client_key(ensure_client_key(keys, name, curve_keypair)) for name in "abc"}
    patient = some_settings(notice_timeout_s=1000.0, server_timeout_s=1000.0)
    settings = settings_in(tmp_path, relay_weights=2, keys=str(keys.directory), rules=patient)
    async with a_coordinator_serving(settings) as (_, address), AsyncExitStack() as stack:
        servers = {}
        for name in "abc":
            opened = a_server(address, epoch=f"epoch-{name}", name=name, key=own[name])
            servers[name] = await stack.enter_async_context(opened)
            await offer(servers[name], name)
            await servers[name].expect(RelayPlan)
        await until(servers["a"], RelayPlan(source=None, admitted=(own["c"].public,)))
        revoke_key(keys.directory, "c")
        await until(servers["a"], DIRECT)
