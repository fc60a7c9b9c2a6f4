"""One stream's pieces on their way into a staging."""

from __future__ import annotations

import asyncio
import threading
import zlib

import pytest

from services.aggregator import intake
from services.aggregator.domain import Piece
from services.aggregator.intake import BACKLOG, Intake, Staged
from services.common.blobs import DirectoryBlobStore
from shelora.errors import ChecksumMismatch, SizeMismatch, StorageFull

DATA = bytes(range(256)) * 40
CUT = 1000
PIECES = [Piece(at, DATA[at : at + CUT], zlib.crc32(DATA[at : at + CUT])) for at in range(0, len(DATA), CUT)]


class Slow:
    """A staging whose appends wait until they are let through, and that counts its syncs."""

    def __init__(self, staging):
        self._staging = staging
        self.gate = threading.Event()
        self.synced = 0

    def append(self, offset, data):
        assert self.gate.wait(10)
        self._staging.append(offset, data)

    def sync(self):
        self.synced += 1
        self._staging.sync()

    def __getattr__(self, name):
        return getattr(self._staging, name)


@pytest.fixture
def staging(tmp_path):
    return Slow(DirectoryBlobStore(tmp_path).staging("upload"))


@pytest.fixture
def lock():
    return asyncio.Lock()


async def yes():
    return True


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


def make(staging, lock, wanted=yes, size_bytes=SIZE, arriving=None):
    staged = Staged(b"digest", staging, arriving or Onlooker())
    return Intake(size_bytes, lock, lambda: staged, wanted)


async def test_everything_is_staged_in_order(staging, lock):
    staging.gate.set()
    taking = make(staging, lock)
    for piece in PIECES:
        assert await taking.put(piece)
    assert await taking.end()
    assert staging.path.read_bytes() == DATA
    assert not lock.locked()


async def test_what_is_staged_is_looked_at(staging, lock):
    staging.gate.set()
    onlooker = Onlooker()
    taking = make(staging, lock, arriving=onlooker)
    with pytest.raises(ChecksumMismatch):
        await take(taking, PIECES[0], PIECES[1], Piece(2 * CUT, PIECES[2].data, 7))
    await taking.settle()
    assert onlooker.seen == [(piece.offset, piece.data) for piece in PIECES[:2]]


async def test_a_slow_disk_keeps_the_sender_waiting(staging, lock):
    taking = make(staging, lock)
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


async def test_the_disk_begins_before_the_end(staging, lock, monkeypatch):
    monkeypatch.setattr(intake, "SYNC_BYTES", 3 * CUT)
    staging.gate.set()
    taking = make(staging, lock)
    for piece in PIECES:
        await taking.put(piece)
        await asyncio.sleep(0.01)
    await taking.end()
    assert 2 <= staging.synced <= len(PIECES) // 3


async def test_nothing_is_staged_that_is_not_wanted_any_more(staging, lock):
    staging.gate.set()
    answers = iter([True, False])

    async def wanted():
        return next(answers)

    taking = make(staging, lock, wanted)
    assert await taking.put(PIECES[0])
    await asyncio.sleep(0.05)
    assert not await taking.put(PIECES[1])
    assert staging.size_bytes == CUT
    assert not lock.locked()


async def test_end_says_when_the_rest_is_not_wanted(staging, lock):
    answers = iter([True, False])

    async def wanted():
        staging.gate.set()
        return next(answers)

    taking = make(staging, lock, wanted)
    taking._backlog.append(PIECES[0])
    assert await taking.put(PIECES[1])
    await taking.settle()
    taking._backlog.append(PIECES[2])
    assert not await taking.end()
    assert staging.size_bytes == 2 * CUT


async def test_damaged_piece_is_refused_and_those_before_stay(staging, lock):
    staging.gate.set()
    taking = make(staging, lock)
    await taking.put(PIECES[0])
    with pytest.raises(ChecksumMismatch, match="offset 1000"):
        await take(taking, Piece(CUT, PIECES[1].data, 7))
    await taking.settle()
    assert staging.size_bytes == CUT
    assert not lock.locked()


async def test_more_bytes_than_announced_are_refused(staging, lock):
    staging.gate.set()
    taking = make(staging, lock, size_bytes=CUT + 1)
    with pytest.raises(SizeMismatch, match="expected 1001 bytes, got 2000 or more"):
        await take(taking, *PIECES[:2])
    assert staging.size_bytes == 0


async def test_a_disk_that_fails_is_told_with_the_next_piece(staging, lock, monkeypatch):
    monkeypatch.setattr(intake, "SYNC_BYTES", 1)
    staging.gate.set()

    def full():
        raise StorageFull("no space left")

    staging.sync = full
    taking = make(staging, lock)
    with pytest.raises(StorageFull):
        await take(taking, *PIECES)
    await taking.settle()
    assert not lock.locked()
