"""Streams that are sent; what goes wrong on real ones is in tests/contract/test_error_mapping.py."""

from __future__ import annotations

import asyncio

import pytest

from services.common.channel import send_stream


class Held:
    """A call that answers with what was written, each write as soon as it is let through."""

    def __init__(self) -> None:
        self.through = asyncio.Semaphore(0)
        self.written: list[str] = []
        self.cancelled = False

    def __call__(self, timeout=None):
        return self

    def add_done_callback(self, callback) -> None:
        pass

    async def write(self, message) -> None:
        await self.through.acquire()
        self.written.append(message)

    async def done_writing(self) -> None:
        self.written.append("end")

    def cancel(self) -> None:
        self.cancelled = True

    def __await__(self):
        yield from asyncio.sleep(0).__await__()
        return list(self.written)


@pytest.fixture
async def call():
    return Held()


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_message_is_made_while_the_one_before_is_on_its_way(call):
    made = []

    async def requests():
        for message in ("first", "second", "third"):
            made.append(message)
            yield message

    sending = asyncio.create_task(send_stream(call, requests(), timeout_s=None))
    await settled()
    assert (made, call.written) == (["first", "second"], [])
    call.through.release()
    await settled()
    assert (made, call.written) == (["first", "second", "third"], ["first"])
    for _ in range(2):
        call.through.release()
    assert await sending == ["first", "second", "third", "end"]


async def test_what_is_on_its_way_ends_with_a_cancelled_call(call):
    async def requests():
        yield "first"
        await asyncio.Event().wait()

    before = asyncio.all_tasks()
    sending = asyncio.create_task(send_stream(call, requests(), timeout_s=None))
    await settled()
    (writing,) = asyncio.all_tasks() - before - {sending}
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    await settled()
    assert call.cancelled
    assert writing.cancelled()
