"""Who may have bytes of an upload in memory or on their way to the disk: a few streams, however many agents."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final

from services.common.patience import Patience
from services.common.transfer import Piece

STREAMS: Final = 4
"""Uploads that are taken in at the same time; the senders of others wait until they are asked to begin.

A turn lasts until the payload is durable and accepted: where the disk is the slowest part, uploads that only wait for
it would otherwise add up, each with the receive buffer of its connection (about 1 MB).
"""

_TURN_S: Final = 0.25
_BYTES_PER_S: Final = 4 << 20


class Turn:
    """One stream's turn to be taken in: a bounded number of streams have one, however many there are.

    Every stream begins with a turn. A sender that is slow loses it: one that is waited for longer than a quarter of a
    second, at once or in many small waits for less than 4 MiB a second. From then on its pieces are taken as they come,
    so that thousands of slow senders neither keep others waiting nor wait for each other, until it is fast again.
    """

    def __init__(self, turns: asyncio.Semaphore) -> None:
        self._turns = turns
        self._held = False
        self._slow = False
        self._credit_s = _TURN_S
        self._loop = asyncio.get_running_loop()
        self._patience = Patience(_TURN_S, self._lose)

    @property
    def held(self) -> bool:
        """Whether this stream has its turn."""
        return self._held

    async def next(self, pieces: AsyncIterator[Piece]) -> Piece | None:
        """The next piece, asked for once it is this stream's turn unless its sender is slow; None at the end."""
        if not self._slow:
            await self.take()
        began = self._patience.begin()
        try:
            piece = await pieces.__anext__()
        except StopAsyncIteration:
            return None
        finally:
            self._patience.end()
        earned = len(piece.data) / _BYTES_PER_S
        self._credit_s = min(_TURN_S, max(0.0, self._credit_s) + earned - (self._loop.time() - began))
        if self._credit_s < 0:
            self._lose()
        elif self._credit_s == _TURN_S:
            self._slow = False
        return piece

    async def take(self) -> None:
        """Wait until it is this stream's turn, unless it is."""
        if not self._held:
            # Whoever waits already comes first; before Python 3.11 a semaphore alone does not see to that.
            await asyncio.sleep(0)
            await self._turns.acquire()
            self._held = True

    def _lose(self) -> None:
        self._slow = True
        self.end()

    def end(self) -> None:
        """Let another stream have its turn."""
        if self._held:
            self._held = False
            self._turns.release()
