from __future__ import annotations

import asyncio
import contextvars
import functools
import threading

import anyio
import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from services.common.threads import WorkerPool, in_thread, keep_algebra_on_callers_thread, spread
from shelora.errors import QuotaExceeded


async def test_functions_run_in_other_threads() -> None:
    pool = WorkerPool(threads=1)
    assert await pool.run(threading.get_ident) != threading.get_ident()
    assert await pool.run(int, "11", base=2) == 3
    with pytest.raises(ZeroDivisionError):
        await pool.run(lambda: 1 // 0)
    assert (pool.running, pool.waiting) == (0, 0)


async def test_no_more_run_at_once_than_threads() -> None:
    pool = WorkerPool(threads=2, queue=10)
    barrier = threading.Barrier(2, timeout=20)
    lock = threading.Lock()
    running = most = 0

    def work() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        barrier.wait()
        with lock:
            running -= 1

    async with anyio.create_task_group() as tasks:
        for _ in range(8):
            tasks.start_soon(pool.run, work)
    assert most == 2


async def test_a_full_queue_refuses() -> None:
    pool = WorkerPool(threads=1, queue=1)
    release = threading.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(pool.run, release.wait, 20)
        tasks.start_soon(pool.run, release.wait, 20)
        await anyio.lowlevel.checkpoint()
        assert (pool.running, pool.waiting) == (1, 1)
        with pytest.raises(QuotaExceeded, match="at most 1 waiting"):
            await pool.run(release.wait, 20)
        release.set()
    assert await pool.run(int) == 0


async def test_cancellation_leaves_the_queue_but_waits_for_a_running_function() -> None:
    pool = WorkerPool(threads=1, queue=5)
    started, release, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        release.wait(20)
        ended.set()

    running = asyncio.create_task(pool.run(work))
    waiting = asyncio.create_task(pool.run(work))
    await asyncio.to_thread(started.wait, 20)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not ended.is_set()
    for _ in range(3):
        running.cancel()
        await asyncio.sleep(0)
        assert not running.done()
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert ended.is_set()
    assert pool.running == 0


async def test_cancel_scopes_wait_too_and_late_errors_are_dropped() -> None:
    pool = WorkerPool(threads=1)
    started, release = threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        release.wait(20)
        raise ValueError("nobody waits for this")

    async def let_go() -> None:
        await asyncio.to_thread(started.wait, 20)
        tasks.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            for _ in range(5):
                await anyio.lowlevel.checkpoint()
            assert pool.running == 1
            release.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(pool.run, work)
        tasks.start_soon(let_go)
    assert release.is_set()
    assert pool.running == 0


async def test_functions_see_the_callers_context_and_closed_pools_refuse() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")
    variable.set("the caller's")
    assert await in_thread(variable.get) == "the caller's"
    pool = WorkerPool(threads=1)
    assert await pool.run(variable.get) == "the caller's"
    pool.close()
    with pytest.raises(RuntimeError, match="shutdown"):
        await pool.run(int)


@pytest.mark.parametrize(("threads", "queue"), [(0, 1), (1, -1)])
def test_bounds_are_checked(threads: int, queue: int) -> None:
    with pytest.raises(ValueError, match="worker pool"):
        WorkerPool(threads, queue)


async def test_spread_calls_answer_in_order_and_never_more_at_once_than_allowed():
    running, most = 0, 0

    async def one(number: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(5 - number):
            await asyncio.sleep(0)
        running -= 1
        return number

    assert await spread((functools.partial(one, number) for number in range(5)), 2) == [0, 1, 2, 3, 4]
    assert most == 2


async def test_spread_waits_for_what_has_begun_and_begins_nothing_after_a_failure():
    ended: list[int] = []

    async def one(number: int) -> None:
        if number == 1:
            raise ValueError("the first one")
        await asyncio.sleep(0)
        ended.append(number)

    with pytest.raises(ValueError, match="the first one"):
        await spread((functools.partial(one, number) for number in range(9)), 2)
    assert ended == [0]


def algebra_threads() -> set[int]:
    np.linalg.qr(np.eye(4))
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


def test_linear_algebra_stays_on_its_caller_s_thread() -> None:
    with threadpool_limits(limits=2, user_api="blas"):
        assert max(algebra_threads()) > 1
        keep_algebra_on_callers_thread()
        assert algebra_threads() == {1}
