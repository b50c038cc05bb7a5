"""The event loop in a background thread: results, exceptions, and the end of the thread."""

import asyncio
import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from rlkit.event_loop import EventLoopThread


async def in_which_thread():
    return threading.current_thread()


def test_coroutines_of_several_threads_run_in_one_loop():
    loop = EventLoopThread()
    # Each coroutine waits for the others, so they run at the same time.
    barrier = asyncio.Barrier(4)

    async def wait(number):
        await barrier.wait()
        return number, threading.current_thread()

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda number: loop.run(wait(number)), range(4)))
    assert [number for number, _ in results] == [0, 1, 2, 3]
    assert len({thread for _, thread in results}) == 1


def test_exception_of_a_coroutine_is_raised_and_the_loop_continues():
    async def fail():
        raise ValueError("a bug")

    loop = EventLoopThread()
    with pytest.raises(ValueError, match="a bug"):
        loop.run(fail())
    assert loop.run(in_which_thread()).daemon


def test_thread_ends_when_the_object_is_deleted():
    loop = EventLoopThread()
    thread = loop.run(in_which_thread())
    assert thread.is_alive()
    del loop
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()
