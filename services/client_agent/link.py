"""An agent's connection to the aggregator: what is open when, and under which certificate."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc

from services.common.channel import open_channel
from services.common.chunk_codec import RoundsStub, rounds_stub
from services.common.tls import IdentityFiles, channel_credentials

LONG_BYTES = 4 << 20
"""Payloads of this length and more are sent over a connection of their own."""


class Link:
    """The channel to the aggregator under one certificate, opened for the first call; retired by a renewal.

    Attributes:
        retired: set when another certificate is in use; the channel is closed once no call uses it.
        lasting: whether the channel stays open between calls.
    """

    def __init__(self, aggregator: str, files: IdentityFiles) -> None:
        """The aggregator's host:port and a complete identity; nothing is connected yet."""
        self._aggregator = aggregator
        self._credentials = channel_credentials(files)
        self._channel: grpc.aio.Channel | None = None
        self._users = 0
        self.retired = asyncio.Event()
        self.lasting = True

    @contextlib.asynccontextmanager
    async def used(self) -> AsyncIterator[RoundsStub]:
        """What a call goes through."""
        if self._channel is None:
            self._channel = open_channel(self._aggregator, self._credentials)
            self._rounds = rounds_stub(self._channel)
        self._users += 1
        try:
            yield self._rounds
        finally:
            self._users -= 1
            await self._close_if_idle()

    @contextlib.asynccontextmanager
    async def rounds_for(self, size_bytes: int) -> AsyncIterator[RoundsStub]:
        """Where to send a payload: a long one gets a connection of its own, closed afterwards.

        The aggregator's transport keeps a connection's receive buffer as large as its traffic once was, about 1 MB
        after a long upload; thousands of connections that wait for the next round would hold thousands of them.
        """
        if size_bytes < LONG_BYTES:
            async with self.used() as rounds:
                yield rounds
            return
        channel = open_channel(self._aggregator, self._credentials)
        try:
            yield rounds_stub(channel)
        finally:
            await channel.close()

    async def retire(self) -> None:
        """Let the calls in flight finish, then close."""
        self.retired.set()
        await self._close_if_idle()

    async def close(self) -> None:
        """Close at once; a later call opens another channel."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    async def _close_if_idle(self) -> None:
        if not self._users and (self.retired.is_set() or not self.lasting):
            await self.close()
