"""What one stream brings, on its way to disk: in a thread, while more arrives."""

from __future__ import annotations

import asyncio
import contextlib
import queue
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Final

from services.aggregator.ports import Arriving
from services.common.blobs import Staging
from services.common.digests import Buffer
from services.common.threads import ended, start_in_thread
from services.common.transfer import Piece, check_crc
from shelora.errors import SheLoraError, SizeMismatch

BACKLOG: Final = 2
"""Pieces of a stream that may wait while another is staged."""

LINGER_S: Final = 0.05
"""How long a thread waits for the next piece of a sender that has a turn: a new start costs as much as a piece."""


@dataclass(frozen=True)
class Staged:
    """The staged bytes of one payload and what has looked at them; both begin again at offset 0.

    Whichever streams bring the bytes: what was found right is what is in the file.

    Attributes:
        digest: of the whole payload as announced.
        staging: the bytes.
        arriving: looks at them.
    """

    digest: bytes
    staging: Staging
    arriving: Arriving

    def append(self, offset: int, data: Buffer) -> None:
        """Add bytes at the end and look at them; see `Staging.append`."""
        self.staging.append(offset, data)
        self.arriving.add(offset, data)


class Intake:
    """One stream's pieces on their way into its staging.

    Args:
        size_bytes: length that the payload was announced with.
        lock: held while pieces are staged, so that streams of the same payload do not mix.
        staged: gives the staged bytes; asked with the lock held.
        wanted: whether more bytes make sense; asked before every piece, and again once the lock is held.
        hurried: whether a thread shall wait for the next piece a moment; asked in the thread.
        executor: where threads come from.
    """

    def __init__(
        self,
        size_bytes: int,
        lock: asyncio.Lock,
        staged: Callable[[], Staged],
        wanted: Callable[[], Awaitable[bool]],
        hurried: Callable[[], bool],
        executor: Executor,
    ) -> None:
        self._size_bytes = size_bytes
        self._lock = lock
        self._staged = staged
        self._wanted = wanted
        self._hurried = hurried
        self._executor = executor
        self._loop = asyncio.get_running_loop()
        self._backlog: queue.SimpleQueue[Piece | None] = queue.SimpleQueue()
        self._attended = False  # A thread will look into the backlog once more.
        self._crowded = False  # Somebody waits for room in it.
        self._room = asyncio.Event()
        self._appending: asyncio.Future[None] | None = None

    async def put(self, piece: Piece) -> bool:
        """Take the next piece, waiting while too many are underway; False when nothing more is wanted.

        Raises:
            ChecksumMismatch, OffsetMismatch, SizeMismatch, StorageFull: what became of this piece or one before.
        """
        if not await self._wanted():
            return False
        self._backlog.put(piece)
        if not self._attended and not await self._attend():
            return False
        while self._full():
            self._room.clear()
            self._crowded = True
            # The thread looks at the mark after it has taken a piece, so one of the two sees what the other did.
            if self._full():
                await self._room.wait()
        return True

    async def end(self) -> bool:
        """Wait until everything is staged; False when it is not wanted any more.

        Raises:
            ChecksumMismatch, OffsetMismatch, SizeMismatch, StorageFull: what became of a piece.
        """
        self._backlog.put(None)
        while self._appending is not None or not self._backlog.empty():
            if not await self._attend():
                return False
        return True

    async def settle(self) -> None:
        """Wait for what has begun, whatever becomes of the stream; its errors are not the ones to tell."""
        self._backlog.put(None)
        if self._appending is not None:
            with contextlib.suppress(SheLoraError, OSError):
                await ended(self._appending)

    def _full(self) -> bool:
        return self._attended and self._backlog.qsize() >= BACKLOG

    async def _attend(self) -> bool:
        """Wait for the thread, and if it has left anything begin another, holding the lock until that is done."""
        if self._appending is not None:
            await ended(self._appending)
            self._appending = None
        if self._backlog.empty():
            return True
        await self._lock.acquire()
        try:
            if not await self._wanted():
                self._lock.release()
                return False
            self._attended = True
            self._appending = start_in_thread(self._drain, self._staged(), executor=self._executor)
        except BaseException:
            self._attended = False
            self._lock.release()
            raise
        self._appending.add_done_callback(self._drained)
        return True

    def _drained(self, _: object) -> None:
        self._lock.release()
        self._room.set()

    def _drain(self, staged: Staged) -> None:
        """Runs in a thread, which alone takes from the backlog while it does."""
        try:
            while (piece := self._next()) is not None:
                if self._crowded:
                    self._crowded = False
                    self._loop.call_soon_threadsafe(self._room.set)
                self._stage(staged, piece)
        finally:
            self._attended = False

    def _next(self) -> Piece | None:
        with contextlib.suppress(queue.Empty):
            return self._backlog.get_nowait()
        # Before Python 3.11 a wait whose time has passed already can last for ever, unless a look came just before it.
        if self._hurried():
            with contextlib.suppress(queue.Empty):
                return self._backlog.get(timeout=LINGER_S)
        self._attended = False
        # Whoever puts a piece looks at the mark afterwards, so a piece that came meanwhile is seen here or there.
        with contextlib.suppress(queue.Empty):
            piece = self._backlog.get_nowait()
            self._attended = True
            return piece
        return None

    def _stage(self, staged: Staged, piece: Piece) -> None:
        check_crc(piece.offset, piece.data, piece.crc32)
        end = piece.offset + len(piece.data)
        if end > self._size_bytes:
            staged.staging.discard()
            raise SizeMismatch(
                f"expected {self._size_bytes} bytes, got {end} or more",
                hint="send the payload again from its beginning",
            )
        staged.append(piece.offset, piece.data)
