"""reward+http: OpenRLHF's request, several servers, and a server that does everything wrong."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import pytest

from common.environments import EnvironmentSettings
from rollout_server.environments import environment_at
from rollout_server.environments.environment import Environment, EnvironmentFailure, Said, parse_row
from tests.rollout_server.http_twin import Dies, Hangs, HttpTwin, Request, an_http_server, obeys, reply

ROW = parse_row(b'{"prompt": "p", "label": "42"}')
ONE_REWARD = '{"rewards": [1.0]}'


def url_of(server: HttpTwin) -> str:
    return f"reward+http://127.0.0.1:{server.port}/get_reward"


@asynccontextmanager
async def asking(*servers: HttpTwin, **settings: Any) -> AsyncIterator[Environment]:
    values = {"step_timeout_s": 5.0, "replicas": tuple(map(url_of, servers[1:]))} | settings
    async with asyncio.timeout(30), environment_at(url_of(servers[0]), EnvironmentSettings(**values)) as environment:
        yield environment


async def reward_of(environment: Environment, text: str = "reward 1", *, row: Any = ROW, prompt: str = "") -> float:
    async with environment.episode(row, seed=0) as episode:
        await episode.reset()
        said = Said(text="", read_prompt=lambda: prompt, read_all=lambda: text)
        return (await episode.step(said)).reward


async def failure_of(environment: Environment, text: str = "reward 1") -> EnvironmentFailure:
    with pytest.raises(EnvironmentFailure) as caught:
        await reward_of(environment, text)
    return caught.value


def always(answer: bytes | Exception | Callable[[Request], bytes]) -> Any:
    async def handler(request: Request) -> bytes:
        if isinstance(answer, Exception):
            raise answer
        return answer(request) if callable(answer) else answer

    return handler


# --- the request -----------------------------------------------------------------------------------------------------


async def test_the_request_is_openrlhfs_byte_for_byte():
    async with an_http_server(always(reply(ONE_REWARD))) as server, asking(server) as environment:
        await reward_of(environment, "reward 0.5<|im_end|> é\n", prompt="<|user|>p")
        [request] = server.requests
    expected = rb'{"query": ["reward 0.5<|im_end|> \u00e9\n"], "prompts": ["<|user|>p"], "labels": ["42"]}'
    assert request.body == expected
    assert request.head.startswith("POST /get_reward HTTP/1.1\r\n")
    assert "content-type: application/json\r\n" in request.head


async def test_a_row_without_a_label_has_the_empty_one():
    async with an_http_server(obeys) as server, asking(server) as environment:
        await reward_of(environment, row=parse_row(b'{"prompt": "p"}'))
    assert server.requests[0].json["labels"] == [""]


async def test_completions_that_come_together_go_together_and_each_gets_its_own_reward():
    async with an_http_server(obeys) as server, asking(server, max_batch=16) as environment:
        await reward_of(environment)
        rewards = await asyncio.gather(*(reward_of(environment, f"reward {number}") for number in range(100)))
    assert rewards == list(range(100))
    sizes = [len(request.json["query"]) for request in server.requests]
    assert max(sizes) == 16
    assert len(sizes) < 20
    assert server.num_connections <= 9


async def test_a_server_that_is_not_known_to_be_up_is_not_sent_a_batch_first():
    async with an_http_server(obeys) as server, asking(server) as environment:
        await asyncio.gather(*(reward_of(environment) for _ in range(50)))
    assert {len(request.json["query"]) for request in server.requests[:8]} == {1}


async def test_several_servers_share_the_work():
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(an_http_server(obeys)) for _ in range(3)]
        environment = await stack.enter_async_context(asking(*servers, max_batch=1))
        await asyncio.gather(*(reward_of(environment, f"reward {number}") for number in range(90)))
        assert min(len(server.requests) for server in servers) >= 15


async def test_no_more_requests_run_at_once_than_a_server_is_asked_to_stand():
    running = Counter[str]()

    async def counting(request: Request) -> bytes:
        running["now"] += 1
        running["most"] = max(running["most"], running["now"])
        await asyncio.sleep(0.01)
        running["now"] -= 1
        return await obeys(request)

    async with an_http_server(counting) as server, asking(server, max_batch=1) as environment:
        await asyncio.gather(*(reward_of(environment) for _ in range(60)))
    assert running["most"] == 8


# --- servers that are down, and come back ---------------------------------------------------------------------------


async def test_no_episode_begins_while_no_server_can_be_reached_and_one_does_when_it_is_back():
    async with an_http_server(obeys) as server:
        port = server.port
    async with asking(server) as environment, environment.episode(ROW, seed=0) as episode:
        for _ in range(3):
            with pytest.raises(EnvironmentFailure) as down:
                await episode.reset()
            assert down.value.kind == "environment_unavailable"
            assert f"http://127.0.0.1:{port}/get_reward" in down.value.reason
        async with an_http_server(obeys, port=port):
            with pytest.raises(EnvironmentFailure):  # not asked again before the pause is over
                await episode.reset()
            await asyncio.sleep(1.0)
            assert await reward_of(environment) == 1.0


async def test_a_completion_outlives_a_server_that_is_restarted():
    async with an_http_server(obeys) as first:
        port = first.port
        async with asking(first, step_timeout_s=20) as environment:
            assert await reward_of(environment) == 1.0
            async with environment.episode(ROW, seed=0) as episode:
                await episode.reset()
                await first.stop()
                async with asyncio.TaskGroup() as tasks:
                    step = tasks.create_task(episode.step(Said(text="", read_all=lambda: "reward 7")))
                    await asyncio.sleep(0.1)  # it fails at least once meanwhile; nothing depends on it
                    async with an_http_server(obeys, port=port):
                        assert (await step).reward == 7.0


async def test_all_samples_of_a_group_are_rewarded_when_a_server_is_tried_again_or_none_is():
    async with an_http_server(obeys) as server:
        port = server.port
    async with asking(server) as environment:
        for _ in range(4):
            with pytest.raises(ExceptionGroup):
                await a_group(environment)
        async with an_http_server(obeys, port=port) as server:
            while not server.requests:
                with suppress(ExceptionGroup):
                    await a_group(environment)
                await asyncio.sleep(0.05)
            assert sum(len(request.json["query"]) for request in server.requests) == 8


async def a_group(environment: Environment) -> None:
    """Eight completions at once; if one fails, the others are cancelled."""
    async with asyncio.TaskGroup() as samples:
        for _ in range(8):
            samples.create_task(reward_of(environment))


async def test_one_server_of_several_that_is_down_costs_nothing_but_a_repetition():
    async with an_http_server(obeys) as gone:
        pass
    async with an_http_server(obeys) as server, asking(gone, server) as environment:
        rewards = await asyncio.gather(*(reward_of(environment, f"reward {number}") for number in range(200)))
    assert rewards == list(range(200))


@pytest.mark.parametrize("first", [Dies(), reply("busy", status=503), reply("slow down", status=429)])
async def test_a_request_that_fails_is_repeated(first):
    answers = iter([first])

    async def fails_once(request: Request) -> bytes:
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
            return answer
        return await obeys(request)

    async with an_http_server(fails_once) as server, asking(server) as environment:
        assert await reward_of(environment, "reward 3") == 3.0
    assert len(server.requests) == 2


async def test_a_request_is_not_repeated_for_ever():
    async with an_http_server(always(reply("busy", status=503))) as server, asking(server, tries=2) as environment:
        failure = await failure_of(environment)
    assert (failure.kind, len(server.requests)) == ("environment_unavailable", 2)
    assert "said 503: busy" in failure.reason


async def test_a_completion_that_a_server_cannot_stand_fails_alone():
    async def poisoned(request: Request) -> bytes:
        if "poison" in request.json["query"]:
            raise Dies
        return await obeys(request)

    async with an_http_server(poisoned) as server, asking(server, tries=3) as environment:
        await reward_of(environment)
        async with asyncio.TaskGroup() as tasks:
            poison = tasks.create_task(failure_of(environment, "poison"))
            good = [tasks.create_task(reward_of(environment, f"reward {number}")) for number in range(30)]
    assert [task.result() for task in good] == list(range(30))
    assert poison.result().kind == "environment_unavailable"


# --- everything else a server may do ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "kind", "reason"),
    [
        (Hangs(), "environment_timeout", "no reward within 0.5 s"),
        (reply("", status=404), "environment_unavailable", "said 404"),
        (reply("", status=302, headers="Location: http://10.9.9.9/\r\n"), "environment_unavailable", "not followed"),
        (reply("no such field", status=422), "environment_error", "said 422: no such field"),
        (reply(b"\xff\x00garbage"), "environment_error", "not JSON"),
        (reply("[" * 50_000), "environment_error", "not JSON"),
        (reply("[1.0]"), "environment_error", 'no list of "rewards"'),
        (reply('{"rewards": 1.0}'), "environment_error", 'no list of "rewards"'),
        (reply('{"rewards": []}'), "environment_error", "1 queries were answered with 0 rewards"),
        (reply('{"rewards": [1, 2]}'), "environment_error", "1 queries were answered with 2 rewards"),
        (reply('{"rewards": [null]}'), "bad_reward", "NoneType"),
        (reply('{"rewards": [NaN]}'), "bad_reward", "got nan"),
        (reply('{"rewards": [-Infinity]}'), "bad_reward", "got -inf"),
        (reply('{"rewards": [1e999]}'), "bad_reward", "got inf"),
        (reply('{"rewards": [1e30]}'), "bad_reward", "1e+30"),
        (reply('{"rewards": ["1.0"]}'), "bad_reward", "str"),
        (reply('{"rewards": [true]}'), "bad_reward", "bool"),
        (reply('{"rewards": [{"a": 1}]}'), "bad_reward", "dict"),
        (reply(b"x" * (2 << 20)), "environment_error", "a reply of 2097152 bytes, at most 65536 bytes"),
        (reply(b"x", length=100 << 20), "environment_error", "a reply of 104857600 bytes, at most 65536 bytes"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * (1 << 20), "environment_error", "sent more than a reply may have"),
        (reply(ONE_REWARD, headers="Content-Encoding: gzip\r\n"), "environment_error", "in 'gzip'"),
        (b"\x00\x01 this is no HTTP\r\n\r\n", "environment_unavailable", "illegal"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nshort", "environment_timeout", "no reward within"),
    ],
)
async def test_what_is_no_reward_is_a_failure_of_its_kind_and_never_a_reward(answer, kind, reason):
    settings = {"step_timeout_s": 0.5, "tries": 2, "max_reply_bytes": 1 << 16}
    async with an_http_server(always(answer)) as server, asking(server, **settings) as environment:
        failure = await failure_of(environment)
    assert failure.kind == kind
    assert reason in failure.reason


async def test_a_reply_that_trickles_in_for_ever_ends_at_the_deadline():
    async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            while True:
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.02)
        except asyncio.IncompleteReadError:
            pass  # only looked whether somebody is here
        except ConnectionError:
            ended.set()
        finally:
            writer.transport.abort()

    ended = asyncio.Event()
    server = await asyncio.start_server(trickle, "127.0.0.1", 0)
    url = f"reward+http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    async with server, asyncio.timeout(5):
        async with environment_at(url, EnvironmentSettings(step_timeout_s=0.5)) as environment:
            assert (await failure_of(environment)).kind == "environment_timeout"
        await ended.wait()


async def test_only_the_configured_server_is_contacted_whatever_proxies_the_system_knows(monkeypatch):
    async with an_http_server(obeys) as proxy, an_http_server(obeys) as server:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        async with asking(server) as environment:
            await reward_of(environment)
        assert (len(server.requests), proxy.num_connections) == (1, 0)


async def test_a_slow_reply_to_one_completion_is_never_credited_to_another():
    async def slow_for_the_first(request: Request) -> bytes:
        [query] = request.json["query"]
        if query == "reward 1":
            await asyncio.sleep(0.4)
        return await obeys(request)

    settings = {"step_timeout_s": 0.3, "max_batch": 1, "tries": 1}
    async with an_http_server(slow_for_the_first) as server, asking(server, **settings) as environment:
        assert (await failure_of(environment, "reward 1")).kind == "environment_timeout"
        for number in range(2, 30):
            assert await reward_of(environment, f"reward {number}") == number


async def test_a_thousand_episodes_leave_no_connection_and_no_question_behind():
    async with an_http_server(obeys) as server:
        async with asking(server) as environment:
            await asyncio.gather(*(reward_of(environment) for _ in range(1000)), failure_of(environment, "nan"))
            assert repr(environment).startswith(f"<RewardHttp {url_of(server)}, 0 queued, [<Replica")
            assert environment._open == set()
        async with asyncio.timeout(5):
            while server.num_open:
                await asyncio.sleep(0.001)


@pytest.mark.parametrize("url", ["reward+http:", "reward+http://", "reward+http://a:b@h/", "reward+http://h:99999999/"])
def test_a_url_that_names_no_server_is_refused(url):
    with pytest.raises(ValueError, match=r"URL|must look like"):
        environment_at(url)


def test_a_replica_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="no replica of a reward model"):
        environment_at("reward+http://h/", EnvironmentSettings(replicas=("python:a:b",)))


def test_the_bytes_are_those_that_requests_would_send():
    requests = pytest.importorskip("requests")
    fields = {"query": ["ü"], "prompts": ["p"], "labels": [""]}
    assert requests.Request("POST", "http://x/", json=fields).prepare().body == json.dumps(fields).encode()
