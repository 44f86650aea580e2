"""What is particular to reward functions in worker processes."""

import asyncio
import os
import select
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import uvloop

from common.environments import EnvironmentSettings
from rollout_server.environments import environment_at
from rollout_server.environments.environment import (
    EnvironmentFailure,
    EnvironmentStartError,
    Said,
    parse_row,
)
from rollout_server.environments.worker_pool import WorkerPool
from rollout_server.environments.worker_process import WorkerCode, WorkerProcess

REWARDS = "tests.rollout_server.reward_functions"
ROW_JSON = b'{"prompt": "do", "bonus": 100}'


def a_pool(function: str = "obeys", *, step_timeout_s: float = 30.0, workers: int = 1, **settings: float) -> WorkerPool:
    return WorkerPool(
        REWARDS, function, EnvironmentSettings(step_timeout_s=step_timeout_s, workers=workers, **settings)
    )


async def failure_of(pool: WorkerPool, completion: str) -> EnvironmentFailure:
    with pytest.raises(EnvironmentFailure) as caught:
        await pool.reward("do", completion, ROW_JSON)
    return caught.value


async def start_error_of(url: str, **settings: float) -> str:
    with pytest.raises(EnvironmentStartError) as caught:
        async with environment_at(url, EnvironmentSettings(**settings)):
            raise AssertionError("entered")
    return str(caught.value)


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


async def until_gone(pid: int) -> None:
    async with asyncio.timeout(10):
        while is_running(pid):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("function", ["num_characters", "num_characters_async"])
@pytest.mark.parametrize(
    "prompt", ['"héllo"', '[{"role": "system", "content": "s"}, {"role": "user", "content": "héllo"}]']
)
async def test_the_function_gets_prompt_completion_and_the_whole_row(function, prompt):
    row = parse_row(f'{{"prompt": {prompt}, "bonus": 100}}'.encode())
    async with (
        environment_at(f"python:{REWARDS}:{function}") as environment,
        environment.episode(row, seed=1) as episode,
    ):
        assert (await episode.step(Said(text="né\n\0"))).reward == 5 + 4 + 100


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("no_such_module:score", "No module named 'no_such_module'"),
        (f"{REWARDS}:no_such_function", f"module {REWARDS} has no function no_such_function"),
        (f"{REWARDS}:not_a_function", "not a function but a int"),
        (f"{REWARDS}:takes_too_little", "must take (prompt, completion, row): too many positional arguments"),
    ],
)
async def test_a_function_that_cannot_be_called_is_an_error_at_the_start_that_names_it(target, reason):
    error = await start_error_of(f"python:{target}")
    assert error.startswith(f"environment python:{target} cannot be used: ")
    assert reason in error
    assert os.getcwd() in error


@pytest.mark.parametrize("target", ["", "module", "module:", ":f", "m:f:g", "m:f()"])
def test_a_malformed_url_is_an_error_that_shows_the_form(target):
    with pytest.raises(ValueError, match="write python:module:name"):
        environment_at(f"python:{target}")


def test_an_unknown_scheme_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'gopher://x' has an unknown scheme; known: python:"):
        environment_at("gopher://x")


async def test_modules_are_found_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("def score(prompt, completion, row): return 7\n")
    monkeypatch.chdir(tmp_path)
    async with WorkerPool("my_rewards", "score", EnvironmentSettings(workers=2)) as pool:
        assert await pool.reward("", "", b"{}") == 7.0


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise RuntimeError('no data')", "RuntimeError: no data (at broken.py:1)"),
        ("import sys; sys.exit('bye')", "SystemExit: bye"),
        ("import os; os._exit(4)", "exit code 4"),
        ("def f(:", "SyntaxError"),
        ("import signal; signal.pause()", "its import took longer than 0.5 s"),
    ],
)
async def test_a_module_that_cannot_be_imported_is_an_error_at_the_start_with_the_reason(
    tmp_path, monkeypatch, source, reason
):
    (tmp_path / "broken.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    assert reason in await start_error_of("python:broken:f", start_timeout_s=0.5 if "pause" in source else 30.0)


async def test_a_module_that_is_slow_to_import_is_waited_for(tmp_path, monkeypatch):
    (tmp_path / "slow.py").write_text("import select\nselect.select([], [], [], 1.0)\ndef f(p, c, r): return 1\n")
    monkeypatch.chdir(tmp_path)
    async with WorkerPool("slow", "f", EnvironmentSettings(step_timeout_s=0.5)) as pool:
        assert await pool.reward("", "", b"{}") == 1.0


async def test_a_function_may_print_what_it_likes():
    async with a_pool() as pool:
        assert await pool.reward("do", "print garbage", ROW_JSON) == 1.0
        assert await pool.reward("do", "reward 2", ROW_JSON) == 2.0


async def test_a_worker_sees_no_accelerator_and_imports_nothing_heavy():
    async with a_pool() as pool:
        assert await pool.reward("do", "accelerator", ROW_JSON) == 0
        assert await pool.reward("do", "heavy_modules", ROW_JSON) == 0


async def a_deep_pipeline(pool: WorkerPool) -> None:
    """Quick calls, after which several are sent ahead to a worker at once."""
    for _ in range(100):
        await pool.reward("do", "reward 1", ROW_JSON)


async def test_calls_sent_ahead_of_time_to_a_worker_that_dies_are_computed_by_the_next():
    async with a_pool() as pool, asyncio.TaskGroup() as tasks:
        await a_deep_pipeline(pool)
        before = tasks.create_task(pool.reward("do", "reward 1", ROW_JSON))
        death = tasks.create_task(failure_of(pool, "die 3"))
        after = [tasks.create_task(pool.reward("do", f"reward {index}", ROW_JSON)) for index in range(5)]
    assert before.result() == 1.0
    assert death.result().reason == "the worker process died: exit code 3"
    assert [reward.result() for reward in after] == list(range(5))


async def test_each_call_sent_ahead_of_time_has_the_whole_time_limit_for_itself():
    async with a_pool(step_timeout_s=1.0) as pool:
        await a_deep_pipeline(pool)
        assert await asyncio.gather(*(pool.reward("do", "wait 0.3", ROW_JSON) for _ in range(5))) == [1.0] * 5


async def test_nothing_is_sent_to_a_worker_that_was_killed():
    worker = await WorkerProcess.start(WorkerCode(REWARDS, "obeys"), EnvironmentSettings(workers=2), lambda: None)
    assert worker.has_room_beside(0)
    worker.kill()
    assert not worker.has_room_beside(0)
    assert await worker.death() == []


async def test_calls_that_wait_behind_one_that_kills_the_worker_are_computed_by_the_next_worker():
    async with a_pool() as pool, asyncio.TaskGroup() as tasks:
        deaths = [tasks.create_task(failure_of(pool, f"die {code}")) for code in (1, 2)]
        rewards = [tasks.create_task(pool.reward("do", f"reward {index}", ROW_JSON)) for index in range(40)]
    assert [death.result().reason for death in deaths] == [f"the worker process died: exit code {c}" for c in (1, 2)]
    assert [reward.result() for reward in rewards] == list(range(40))


async def test_time_spent_waiting_in_the_queue_is_not_counted_against_a_call():
    async with a_pool(step_timeout_s=0.3) as pool, asyncio.TaskGroup() as tasks:
        failures = [tasks.create_task(failure_of(pool, "hang")) for _ in range(3)]
        reward = tasks.create_task(pool.reward("do", "reward 1", ROW_JSON))
    assert {failure.result().kind for failure in failures} == {"environment_timeout"}
    assert reward.result() == 1.0


async def test_async_functions_run_concurrently_within_a_worker():
    async with asyncio.timeout(10), a_pool("obeys_async") as pool, asyncio.TaskGroup() as tasks:
        meetings = [tasks.create_task(pool.reward("do", "rendezvous", ROW_JSON)) for _ in range(3)]
    assert [meeting.result() for meeting in meetings] == [1.0] * 3


async def test_an_async_function_that_hangs_is_ended_without_its_worker():
    async with a_pool("obeys_async", step_timeout_s=0.3) as pool:
        worker = await pool.reward("do", "process", ROW_JSON)
        assert (await failure_of(pool, "hang")).kind == "environment_timeout"
        assert await pool.reward("do", "process", ROW_JSON) == worker


async def test_a_timeout_error_of_the_function_itself_is_an_error_and_not_a_timeout():
    async with a_pool("obeys_async") as pool:
        failure = await failure_of(pool, "raise_timeout")
    assert (failure.kind, failure.reason.split(":")[0]) == ("environment_error", "TimeoutError")


@pytest.mark.parametrize("new_event_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_an_answer_that_waits_while_the_servers_own_loop_is_blocked_is_not_late(new_event_loop):
    class Blocking(asyncio.Protocol):
        def data_received(self, data: bytes) -> None:
            select.select([], [], [], 1.0)

    async def main() -> None:
        ours, theirs = socket.socketpair()
        transport, _ = await asyncio.get_running_loop().create_unix_connection(Blocking, sock=ours)
        with theirs:
            async with a_pool(step_timeout_s=0.5) as pool, asyncio.TaskGroup() as tasks:
                reward = tasks.create_task(pool.reward("do", "wait 0.1", ROW_JSON))
                await asyncio.sleep(0.05)  # the call is on its way
                theirs.send(b"block")
            assert reward.result() == 1.0
        transport.close()

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(main())


async def test_one_call_after_the_other_needs_one_worker_however_many_there_may_be():
    async with a_pool(workers=3) as pool:
        assert len({await pool.reward("do", "process", ROW_JSON) for _ in range(10)}) == 1


async def test_a_slow_call_does_not_hold_up_the_others_while_another_worker_may_be_had():
    async with a_pool(workers=2) as pool, asyncio.TaskGroup() as tasks:
        hang = tasks.create_task(pool.reward("do", "hang", ROW_JSON))
        rewards = [tasks.create_task(pool.reward("do", f"reward {index}", ROW_JSON)) for index in range(30)]
        async with asyncio.timeout(10):
            await asyncio.wait(rewards)
        assert not hang.done()
        hang.cancel()


async def test_a_group_larger_than_the_limit_of_concurrent_steps_waits_and_ends():
    async with a_pool(max_concurrent=3) as pool:
        calls = (pool.reward("do", f"reward {index}", ROW_JSON) for index in range(50))
        assert await asyncio.gather(*calls) == list(range(50))


async def test_no_more_calls_are_queued_than_the_limit_of_concurrent_steps():
    async with a_pool(max_concurrent=3) as pool, asyncio.TaskGroup() as tasks:
        calls = [tasks.create_task(pool.reward("do", "hang", ROW_JSON)) for _ in range(10)]
        await asyncio.sleep(0.05)
        assert "2 calls queued" in repr(pool)
        assert "1 calls in flight" in repr(pool)
        for call in calls:
            call.cancel()


async def test_a_function_that_vanishes_fails_its_calls_with_the_reason(tmp_path, monkeypatch):
    module = tmp_path / "vanishing.py"
    module.write_text("import os\ndef f(p, c, r): os._exit(1)\n")
    monkeypatch.chdir(tmp_path)
    async with asyncio.timeout(20), WorkerPool("vanishing", "f", EnvironmentSettings(workers=2)) as pool:
        await failure_of(pool, "")
        module.unlink()
        failure = await failure_of(pool, "")
    assert "No module named 'vanishing'" in failure.reason


async def test_programs_that_a_hanging_function_started_end_with_it(tmp_path):
    async with a_pool(step_timeout_s=1.0) as pool:
        await failure_of(pool, f"start_program {tmp_path / 'pids'}")
    for pid in (tmp_path / "pids").read_text().split():
        await until_gone(int(pid))


async def test_leaving_ends_the_workers_and_keeps_the_error_of_the_body():
    pids = []

    async def body() -> None:
        async with a_pool() as pool:
            pids.append(int(await pool.reward("do", "process", ROW_JSON)))
            raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        await body()
    assert not is_running(pids[0])


SERVER_THAT_HANGS = """
import asyncio
from tests.rollout_server.test_python_code import ROW_JSON, a_pool
async def main():
    async with a_pool() as pool:
        print(int(await pool.reward("do", "process", ROW_JSON)), flush=True)
        await pool.reward("do", "hang", ROW_JSON)
asyncio.run(main())
"""


async def test_workers_die_with_their_parent_even_while_the_function_hangs():
    server = await asyncio.create_subprocess_exec(sys.executable, "-c", SERVER_THAT_HANGS, stdout=subprocess.PIPE)
    assert server.stdout is not None
    worker_pid = int(await server.stdout.readline())
    assert is_running(worker_pid)
    server.kill()
    await server.wait()
    await until_gone(worker_pid)


def test_all_of_it_works_on_uvloop():
    async def main() -> None:
        async with a_pool(step_timeout_s=0.5, workers=2) as pool, asyncio.TaskGroup() as tasks:
            hang = tasks.create_task(failure_of(pool, "hang"))
            death = tasks.create_task(failure_of(pool, "die 3"))
            rewards = [tasks.create_task(pool.reward("do", f"reward {index}", ROW_JSON)) for index in range(100)]
        assert hang.result().kind == "environment_timeout"
        assert "exit code 3" in death.result().reason
        assert [reward.result() for reward in rewards] == list(range(100))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
