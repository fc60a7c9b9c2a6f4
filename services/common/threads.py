"""Threads for work that would stop the event loop."""

from __future__ import annotations

import asyncio
import contextvars
import functools
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import TypeVar

import anyio
from threadpoolctl import threadpool_limits

from shelora.errors import QuotaExceeded

Result = TypeVar("Result")


async def in_thread(function: Callable[..., Result], *args: object, executor: Executor | None = None) -> Result:
    """Run a function in a thread and wait for its end, whatever happens to the caller.

    A cancelled caller is cancelled only after the function has returned, so that no orphan goes on writing files or
    reading arrays. (gRPC cancels the tasks of calls whose caller has gone.)

    Args:
        function: what to run; sees the caller's context variables.
        args: its arguments.
        executor: where to run it; None means the event loop's own threads.

    Returns:
        What the function returns.

    Raises:
        Exception: whatever the function raises.
    """
    return await ended(start_in_thread(function, *args, executor=executor))


def start_in_thread(
    function: Callable[..., Result], *args: object, executor: Executor | None = None
) -> asyncio.Future[Result]:
    """Start a function in a thread; `ended` waits for it.

    Args:
        function: what to run; sees the caller's context variables.
        args: its arguments.
        executor: where to run it; None means the event loop's own threads.
    """
    bound = functools.partial(contextvars.copy_context().run, function, *args)
    return asyncio.get_running_loop().run_in_executor(executor, bound)


async def ended(future: asyncio.Future[Result]) -> Result:
    """What a started function returns, or raises; a cancelled caller is cancelled only after its end."""
    if future.done():
        return future.result()
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        with anyio.CancelScope(shield=True):
            while not future.done():
                try:
                    await asyncio.wait({future})
                except asyncio.CancelledError:
                    continue  # Cancelled once more; the first one is raised below.
        future.exception()  # Looked at: an exception that nobody waits for any more is not worth a complaint.
        raise


async def spread(calls: Iterable[Callable[[], Awaitable[Result]]], at_once: int) -> list[Result]:
    """Make independent calls, a few at once, and wait for all that have begun, also when one fails.

    Args:
        calls: taken one by one as others end.
        at_once: most calls at once, at least 1.

    Returns:
        What they return, in order.

    Raises:
        Exception: what the first that failed raised; no call begins after that.
    """
    results: dict[int, Result] = {}
    failed: list[BaseException] = []
    numbered = enumerate(calls)

    async def work() -> None:
        for index, call in numbered:
            if failed:
                return
            try:
                results[index] = await call()
            except BaseException as error:
                failed.append(error)
                raise

    await asyncio.gather(*(work() for _ in range(at_once)), return_exceptions=True)
    if failed:
        raise failed[0]
    return [results[index] for index in range(len(results))]


def keep_algebra_on_callers_thread() -> None:
    """Let numpy's linear algebra use no threads of its own, in this whole process from now on.

    Its threads spin while they wait for each other: beside a busy process a decomposition of 1 second took 40. Several
    steps in several threads use the cores as well and wait for nobody.
    """
    threadpool_limits(limits=1, user_api="blas")


class WorkerPool:
    """Runs functions in at most `threads` threads at once; at most `queue` calls wait for one.

    numpy and OpenFHE release the interpreter lock, so several threads really compute at once.

    Args:
        threads: threads that may run at once, at least 1.
        queue: calls that may wait, at least 0.

    Raises:
        ValueError: a bound is too small.
    """

    def __init__(self, threads: int, queue: int = 64) -> None:
        if threads < 1 or queue < 0:
            raise ValueError(f"worker pool: expected threads >= 1 and queue >= 0, got {threads} and {queue}")
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="worker")
        self._free = asyncio.Semaphore(threads)
        self._threads = threads
        self._queue = queue
        self._accepted = 0

    async def run(self, function: Callable[..., Result], *args: object, **kwargs: object) -> Result:
        """Run a function in a thread and wait for it.

        A cancelled caller leaves the queue at once; once the function runs, the cancellation waits for its end.

        Returns:
            What the function returns.

        Raises:
            QuotaExceeded: all threads are busy and the queue is full.
            Exception: whatever the function raises.
        """
        if self._accepted >= self._threads + self._queue:
            raise QuotaExceeded(
                f"compute: expected at most {self._queue} waiting tasks, got one more",
                hint="try again later, or give the service more compute threads",
            )
        self._accepted += 1
        try:
            async with self._free:
                return await in_thread(functools.partial(function, *args, **kwargs), executor=self._executor)
        finally:
            self._accepted -= 1

    @property
    def threads(self) -> int:
        """Threads that may run at once."""
        return self._threads

    @property
    def running(self) -> int:
        """Calls that run now."""
        return min(self._accepted, self._threads)

    @property
    def waiting(self) -> int:
        """Calls that wait for a thread."""
        return max(0, self._accepted - self._threads)

    def close(self) -> None:
        """Let the threads go; functions that run are not interrupted, later calls fail."""
        self._executor.shutdown(wait=False)
