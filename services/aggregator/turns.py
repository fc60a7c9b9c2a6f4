"""Who may have bytes of an upload in memory: a few streams at a time, however many agents there are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final

from services.aggregator.domain import Piece

STREAMS: Final = 8
"""Uploads whose bytes are read at the same time; the senders of others wait until they are asked to begin."""

_TURN_S: Final = 0.25


class Turn:
    """One stream's turn to have a piece in memory: a bounded number of streams have one, however many there are.

    A sender that is slow loses its turn while it is waited for, so that it keeps nobody else waiting.
    """

    def __init__(self, turns: asyncio.Semaphore) -> None:
        self._turns = turns
        self._held = False

    async def next(self, pieces: AsyncIterator[Piece]) -> Piece | None:
        """The next piece, asked for once it is this stream's turn; None at the end."""
        if not self._held:
            await self._turns.acquire()
            self._held = True
        losing = asyncio.get_running_loop().call_later(_TURN_S, self.end)
        try:
            return await pieces.__anext__()
        except StopAsyncIteration:
            return None
        finally:
            losing.cancel()

    def end(self) -> None:
        """Let another stream have its turn."""
        if self._held:
            self._held = False
            self._turns.release()
