"""What one stream brings, on its way to disk: in a thread, while more arrives, synced piece by piece."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from services.aggregator.domain import Piece
from services.aggregator.ports import Arriving
from services.common.blobs import Staging
from services.common.threads import ended, start_in_thread
from services.common.transfer import check_crc
from shelora.errors import SheLoraError, SizeMismatch

BACKLOG: Final = 2
"""Pieces of a stream that wait while others are staged."""

SYNC_BYTES: Final = 8 << 20
"""Staged bytes after which the disk is told to begin: little is left to wait for at the end."""


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

    def append(self, offset: int, data: bytes) -> None:
        """Add bytes at the end and look at them; see `Staging.append`."""
        self.staging.append(offset, data)
        self.arriving.add(offset, data)


class Intake:
    """One stream's pieces on their way into its staging.

    Args:
        size_bytes: length that the payload was announced with.
        lock: held while pieces are staged, so that streams of the same payload do not mix.
        staged: gives the staged bytes; asked with the lock held.
        wanted: whether more bytes make sense; asked with the lock held.
    """

    def __init__(
        self,
        size_bytes: int,
        lock: asyncio.Lock,
        staged: Callable[[], Staged],
        wanted: Callable[[], Awaitable[bool]],
    ) -> None:
        self._size_bytes = size_bytes
        self._lock = lock
        self._staged = staged
        self._wanted = wanted
        self._backlog: deque[Piece] = deque()
        self._unsynced = 0
        self._appending: asyncio.Future[None] | None = None
        self._syncing: asyncio.Future[None] | None = None

    async def put(self, piece: Piece) -> bool:
        """Take the next piece, waiting while too many are underway; False when nothing more is wanted.

        Raises:
            ChecksumMismatch, OffsetMismatch, SizeMismatch, StorageFull: what became of this piece or one before.
        """
        self._backlog.append(piece)
        if self._appending is not None and (self._appending.done() or len(self._backlog) >= BACKLOG):
            await self._appended(self._appending)
        return self._appending is not None or await self._append()

    async def end(self) -> bool:
        """Wait until everything is staged; False when it is not wanted any more.

        Raises:
            ChecksumMismatch, OffsetMismatch, SizeMismatch, StorageFull: what became of a piece.
        """
        while self._appending is not None or self._backlog:
            if self._appending is not None:
                await self._appended(self._appending)
            elif not await self._append():
                return False
        if self._syncing is not None:
            await ended(self._syncing)
        return True

    async def settle(self) -> None:
        """Wait for what has begun, whatever becomes of the stream; its errors are not the ones to tell."""
        for future in (self._appending, self._syncing):
            if future is not None:
                with contextlib.suppress(SheLoraError, OSError):
                    await ended(future)

    async def _append(self) -> bool:
        """Begin to stage what waits, holding the lock until it is done."""
        await self._lock.acquire()
        try:
            if not await self._wanted():
                self._lock.release()
                return False
            self._appending = start_in_thread(self._drain, self._staged())
        except BaseException:
            self._lock.release()
            raise
        self._appending.add_done_callback(lambda _: self._lock.release())
        return True

    async def _appended(self, appending: asyncio.Future[None]) -> None:
        await ended(appending)
        self._appending = None
        if self._unsynced >= SYNC_BYTES and (self._syncing is None or self._syncing.done()):
            if self._syncing is not None:
                await ended(self._syncing)
            self._unsynced = 0
            self._syncing = start_in_thread(self._staged().staging.sync)

    def _drain(self, staged: Staged) -> None:
        """Runs in a thread, which alone takes from the backlog while it does."""
        while self._backlog:
            piece = self._backlog.popleft()
            check_crc(piece.offset, piece.data, piece.crc32)
            end = piece.offset + len(piece.data)
            if end > self._size_bytes:
                staged.staging.discard()
                raise SizeMismatch(
                    f"expected {self._size_bytes} bytes, got {end} or more",
                    hint="send the payload again from its beginning",
                )
            staged.append(piece.offset, piece.data)
            self._unsynced += len(piece.data)
