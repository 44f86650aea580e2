"""The coordinator as a process of its own."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from contextlib import asynccontextmanager

from common.messages import Finished, GroupsAccepted, Lease, Pulse
from learner.coordinator.messages import CloseRun, RunOpened, SnapshotPublished
from learner.coordinator.service_settings import write_settings
from tests.builders_coordinator import a_coordinator, a_heartbeat, an_open_run
from tests.builders_coordinator_service import a_learner, a_server, finish, settings_in


@asynccontextmanager
async def a_process(settings, tmp_path, *arguments):
    path = tmp_path / "settings.json"
    write_settings(settings, path)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "learner.coordinator", str(path), *arguments, stderr=subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_the_process_serves_a_run_and_ends_with_it(tmp_path):
    settings = settings_in(tmp_path)
    async with a_process(settings, tmp_path, "--parent", str(os.getpid())) as process, a_learner(settings) as learner:
        async with asyncio.timeout(30):
            opened = await learner.ask(an_open_run(), RunOpened)
            await learner.say(SnapshotPublished(version=0))
            async with a_server(opened.listen_address) as server:
                await finish(server, await server.expect(Lease))
                await server.expect(GroupsAccepted)
                await learner.say(CloseRun(reason="enough"))
                await server.expect(Finished)
            assert await process.wait() == 0


async def test_the_process_ends_within_a_second_of_sigterm(tmp_path):
    settings = settings_in(tmp_path)
    async with a_process(settings, tmp_path) as process, a_learner(settings) as learner, asyncio.timeout(30):
        opened = await learner.ask(an_open_run(), RunOpened)
        async with a_server(opened.listen_address) as server:
            await server.expect(Lease)
            sent = time.monotonic()
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 128 + signal.SIGTERM
            assert time.monotonic() - sent < 1.0


async def test_the_process_ends_within_a_second_of_sigterm_even_when_the_users_generator_hangs(tmp_path, monkeypatch):
    (tmp_path / "hanging_prompts.py").write_text(
        "import threading\n\ndef rows():\n    yield {'prompt': 'a'}\n    threading.Event().wait()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    settings = settings_in(tmp_path, prompts="python:hanging_prompts:rows")
    async with a_process(settings, tmp_path) as process, a_learner(settings) as learner, asyncio.timeout(30):
        opened = await learner.ask(an_open_run(), RunOpened)
        async with a_server(opened.listen_address) as server:
            await server.ask(a_heartbeat(), Pulse)
            sent = time.monotonic()
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 128 + signal.SIGTERM
            assert time.monotonic() - sent < 1.0


async def test_the_process_dies_with_its_parent(tmp_path):
    settings = settings_in(tmp_path)
    write_settings(settings, tmp_path / "settings.json")
    parent_code = (
        "import os, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-m', 'learner.coordinator', sys.argv[1], "
        "'--parent', str(os.getpid())])\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", parent_code, str(tmp_path / "settings.json"), stdout=subprocess.PIPE
    )
    child_pid = int(await parent.stdout.readline())
    async with a_learner(settings) as learner, asyncio.timeout(30):
        await learner.ask(an_open_run(), RunOpened)
        parent.kill()
        await parent.wait()
        while _is_running(child_pid):
            await asyncio.sleep(0.02)


def _is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_bad_prompts_end_the_process_with_one_sentence(tmp_path):
    settings = settings_in(tmp_path, prompts=str(tmp_path / "none.jsonl"))
    async with a_process(settings, tmp_path) as process, asyncio.timeout(30):
        _, errors = await process.communicate()
    assert process.returncode == 2
    assert "none.jsonl cannot be read: No such file or directory" in errors.decode()
    assert "Traceback" not in errors.decode()


async def test_a_checkpoint_of_other_prompts_ends_the_process_with_one_sentence(tmp_path):
    settings = settings_in(tmp_path)
    frontier = a_coordinator(source="other prompts").frontier()
    async with a_process(settings, tmp_path) as process, a_learner(settings) as learner, asyncio.timeout(30):
        await learner.say(an_open_run(frontier=frontier))
        _, errors = await process.communicate()
    assert process.returncode == 2
    assert "trained on 'other prompts', the run is configured for 'prompts.jsonl (20 rows" in errors.decode()
