"""Blocking work beside the event loop."""

import asyncio
import threading

import pytest

from learner.coordinator.background import Background, in_thread

TIMEOUT_S = 5.0


async def test_calls_run_one_after_the_other_on_one_thread_that_is_not_the_loops():
    background = Background()
    async with asyncio.timeout(TIMEOUT_S):
        threads = {await background.run(threading.current_thread) for _ in range(3)}
    background.close()
    assert len(threads) == 1
    assert threading.current_thread() not in threads


async def test_an_error_is_raised_where_the_result_is_awaited_and_the_next_call_runs():
    background = Background()
    async with asyncio.timeout(TIMEOUT_S):
        with pytest.raises(ZeroDivisionError):
            await background.run(lambda: 1 // 0)
        assert await background.run(lambda: 7) == 7
    background.close()


async def test_a_thread_ends_when_its_call_has():
    thread = await in_thread(threading.current_thread)
    await asyncio.get_running_loop().run_in_executor(None, thread.join, TIMEOUT_S)
    assert not thread.is_alive()


async def test_work_that_hangs_holds_up_nobody_who_stops_waiting_for_it():
    may_end = threading.Event()
    background = Background()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await background.run(lambda: may_end.wait(TIMEOUT_S))
    background.close()
    may_end.set()
