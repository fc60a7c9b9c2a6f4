"""One stream's pieces on their way into a staging."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest

from services.aggregator.intake import BACKLOG, LINGER_S, Intake, Staged
from services.common.blobs import DirectoryBlobStore
from services.common.transfer import Piece
from shelora.errors import ChecksumMismatch, SizeMismatch, StorageFull

DATA = bytes(range(256)) * 40
CUT = 1000
PIECES = [Piece(at, DATA[at : at + CUT], zlib.crc32(DATA[at : at + CUT])) for at in range(0, len(DATA), CUT)]


class Slow:
    """A staging whose appends wait until they are let through."""

    def __init__(self, staging):
        self._staging = staging
        self.gate = threading.Event()

    def append(self, offset, data):
        assert self.gate.wait(10)
        self._staging.append(offset, data)

    def __getattr__(self, name):
        return getattr(self._staging, name)


@pytest.fixture
def staging(tmp_path):
    return Slow(DirectoryBlobStore(tmp_path).staging("upload"))


@pytest.fixture
def lock():
    return asyncio.Lock()


@pytest.fixture
def executor():
    with ThreadPoolExecutor(4) as threads:
        yield threads


async def yes():
    return True


async def until(reached):
    end = time.monotonic() + 10
    while not reached():
        assert time.monotonic() < end
        await asyncio.sleep(0.001)


SIZE = len(DATA)


async def take(taking, *pieces):
    for piece in pieces:
        await taking.put(piece)
    await taking.end()


class Onlooker:
    good_bytes = 0

    def __init__(self):
        self.seen = []

    def add(self, offset, data):
        self.seen.append((offset, data))


@pytest.fixture
def make(staging, lock, executor):
    def made(wanted=yes, size_bytes=SIZE, arriving=None, hurried=True):
        staged = Staged(b"digest", staging, arriving or Onlooker())
        return Intake(size_bytes, lock, lambda: staged, wanted, lambda: hurried, executor)

    return made


async def test_everything_is_staged_in_order(staging, lock, make):
    staging.gate.set()
    taking = make()
    for piece in PIECES:
        assert await taking.put(piece)
    assert await taking.end()
    assert staging.path.read_bytes() == DATA
    assert not lock.locked()


async def test_what_is_staged_is_looked_at(staging, lock, make):
    staging.gate.set()
    onlooker = Onlooker()
    taking = make(arriving=onlooker)
    with pytest.raises(ChecksumMismatch):
        await take(taking, PIECES[0], PIECES[1], Piece(2 * CUT, PIECES[2].data, 7))
    await taking.settle()
    assert onlooker.seen == [(piece.offset, piece.data) for piece in PIECES[:2]]


async def test_a_slow_disk_keeps_the_sender_waiting(staging, lock, make):
    taking = make()
    took = 0

    async def send():
        nonlocal took
        for piece in PIECES:
            assert await taking.put(piece)
            took += 1
        assert await taking.end()

    sending = asyncio.create_task(send())
    await asyncio.sleep(0.1)
    assert 1 <= took <= BACKLOG
    assert lock.locked()
    staging.gate.set()
    await sending
    assert staging.path.read_bytes() == DATA


class Wish:
    """Whether more is wanted, until the test changes its mind."""

    def __init__(self):
        self.lasts = True

    async def __call__(self):
        return self.lasts


async def test_nothing_is_staged_that_is_not_wanted_any_more(staging, lock, make):
    staging.gate.set()
    wish = Wish()
    taking = make(wish)
    assert await taking.put(PIECES[0])
    await until(lambda: staging.size_bytes == CUT)
    wish.lasts = False
    assert not await taking.put(PIECES[1])
    await taking.settle()
    assert staging.size_bytes == CUT
    assert not lock.locked()


async def test_nothing_is_staged_when_another_stream_was_faster(staging, lock, make):
    staging.gate.set()
    wish = Wish()
    await lock.acquire()
    putting = asyncio.create_task(make(wish).put(PIECES[0]))
    await asyncio.sleep(0.01)
    wish.lasts = False
    lock.release()
    assert not await putting
    assert staging.size_bytes == 0
    assert not lock.locked()


async def test_end_says_when_the_payload_is_not_wanted_any_more(staging, lock, make):
    staging.gate.set()
    wish = Wish()
    taking = make(wish, hurried=False)
    assert await taking.put(PIECES[0])
    await until(lambda: not lock.locked())
    wish.lasts = False
    assert not await taking.end()
    assert staging.size_bytes == CUT


@pytest.mark.parametrize(("hurried", "expected"), [(True, {1}), (False, set(range(2, len(PIECES) + 2)))])
async def test_a_thread_waits_for_the_next_piece_of_a_fast_sender(staging, lock, executor, hurried, expected):
    staging.gate.set()
    staged, begun = Staged(b"digest", staging, Onlooker()), 0

    def begin():
        nonlocal begun
        begun += 1
        return staged

    taking = Intake(SIZE, lock, begin, yes, lambda: hurried, executor)
    for piece in PIECES:
        await taking.put(piece)
        await asyncio.sleep(LINGER_S / 20)
    await taking.end()
    assert staging.path.read_bytes() == DATA
    assert begun in expected


class Late:
    """A backlog that finds nothing just before a piece comes."""

    def __init__(self):
        self._queue: queue.SimpleQueue[Piece | None] = queue.SimpleQueue()
        self.looks = threading.Event()
        self.gate = threading.Event()

    def get(self, timeout):
        if self.looks.is_set():
            return self._queue.get(timeout=timeout)
        self.looks.set()
        assert self.gate.wait(10)
        raise queue.Empty

    def __getattr__(self, name):
        return getattr(self._queue, name)


async def test_a_piece_that_comes_as_the_thread_gives_up_is_not_left_behind(staging, make):
    staging.gate.set()
    taking = make()
    taking._backlog = late = Late()
    assert await taking.put(PIECES[0])
    await until(late.looks.is_set)
    assert await taking.put(PIECES[1])
    late.gate.set()
    await until(lambda: staging.size_bytes == 2 * CUT)
    assert await taking.end()


async def test_a_thread_never_waits_for_a_slow_sender(make):
    # Within a few ten thousand looks into an empty queue, Python 3.10 waits for ever in one that has a timeout of 0.
    taking = make(hurried=False)

    def look():
        for _ in range(300_000):
            taking._backlog.put(PIECES[0])
            assert taking._next() is PIECES[0]
            assert taking._next() is None

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    looking.join(30)
    assert not looking.is_alive()


async def test_a_sender_that_pauses_keeps_nobody_out_for_long(staging, lock, make):
    staging.gate.set()
    taking = make()
    await taking.put(PIECES[0])
    assert lock.locked()
    began = time.monotonic()
    async with lock:
        assert time.monotonic() - began < 20 * LINGER_S
        assert staging.size_bytes == CUT
    assert await taking.put(PIECES[1])
    assert await taking.end()
    assert staging.size_bytes == 2 * CUT


async def test_damaged_piece_is_refused_and_those_before_stay(staging, lock, make):
    staging.gate.set()
    taking = make()
    await taking.put(PIECES[0])
    with pytest.raises(ChecksumMismatch, match="offset 1000"):
        await take(taking, Piece(CUT, PIECES[1].data, 7))
    await taking.settle()
    assert staging.size_bytes == CUT
    assert not lock.locked()


async def test_more_bytes_than_announced_are_refused(staging, lock, make):
    staging.gate.set()
    taking = make(size_bytes=CUT + 1)
    with pytest.raises(SizeMismatch, match="expected 1001 bytes, got 2000 or more"):
        await take(taking, *PIECES[:2])
    assert staging.size_bytes == 0


async def test_a_disk_that_fails_is_told_with_a_later_piece(staging, lock, make, monkeypatch):
    def full(offset, data):
        raise StorageFull("no space left")

    staging.append = full
    taking = make()
    with pytest.raises(StorageFull):
        await take(taking, *PIECES)
    await taking.settle()
    assert not lock.locked()
