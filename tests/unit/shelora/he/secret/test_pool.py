from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shelora.errors import InternalFault, InvalidConfiguration, ValueOutOfRange
from shelora.he.secret.pool import MAX_THREADS, BlockPool


@pytest.fixture(scope="module")
def pool():
    opened = BlockPool(2)
    yield opened
    opened.close()


@settings(max_examples=30, deadline=None)
@given(blocks=st.integers(0, 300))
def test_every_block_is_done_once_and_progress_ends_at_all(pool: BlockPool, blocks: int) -> None:
    seen: list[int] = []
    reported: list[int] = []
    pool.run(lambda first, end: seen.extend(range(first, end)), blocks, reported.append)
    assert sorted(seen) == list(range(blocks))
    assert reported == sorted(set(reported))
    assert (reported or [0])[-1] == blocks


def test_progress_is_reported_on_the_calling_thread(pool: BlockPool) -> None:
    workers: set[str] = set()
    callers: set[str] = set()
    pool.run(
        lambda first, end: workers.add(threading.current_thread().name),
        40,
        lambda done: callers.add(threading.current_thread().name),
    )
    assert callers == {threading.current_thread().name}
    assert all(name.startswith("shelora-he") for name in workers)


def test_first_error_is_raised_and_the_rest_is_not_started() -> None:
    pool = BlockPool(1)
    started: list[int] = []

    def work(first: int, end: int) -> None:
        started.append(first)
        raise ValueOutOfRange("expected this, got this")

    try:
        with pytest.raises(ValueOutOfRange):
            pool.run(work, 16 * 1000)
        assert started == [0]
        done: list[int] = []
        pool.run(lambda first, end: done.append(end), 3)
        assert done == [3]
    finally:
        pool.close()


def test_error_in_the_callback_stops_the_work(pool: BlockPool) -> None:
    def progress(done: int) -> None:
        raise RuntimeError("window closed")

    with pytest.raises(RuntimeError, match="window closed"):
        pool.run(lambda first, end: None, 100, progress)


@pytest.mark.parametrize("threads", [0, -1, MAX_THREADS + 1])
def test_thread_bounds(threads: int) -> None:
    with pytest.raises(InvalidConfiguration, match=f"expected 1 to 256, got {threads}"):
        BlockPool(threads)


def test_closed_pool_refuses_work_and_closes_again() -> None:
    pool = BlockPool(1)
    pool.close()
    pool.close()
    with pytest.raises(InternalFault, match="closed"):
        pool.run(lambda first, end: None, 1)
