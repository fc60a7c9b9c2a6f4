"""Streams; what goes wrong on real ones is in tests/contract/test_error_mapping.py."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import weakref
from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from services.common.channel import open_channel, receive_stream, send_stream


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


class Reporting(health.aio.HealthServicer):
    """The standard health service, which knows of one name."""

    async def start(self, server: grpc.aio.Server) -> int:
        await self.set("here", health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(self, server)
        return server.add_insecure_port("127.0.0.1:0")


@pytest.fixture
async def reporting():
    """A stub of a real server, and weak references to the calls that it makes."""
    server = grpc.aio.server()
    port = await Reporting().start(server)
    await server.start()
    made: list[weakref.ref[object]] = []

    def noting(method):
        def begin(request, timeout=None):
            call = method(request, timeout=timeout)
            made.append(weakref.ref(call))
            return call

        return begin

    async with open_channel(f"127.0.0.1:{port}", None) as channel:
        yield noting(cast("Any", health_pb2_grpc.HealthStub(channel)).Watch), made
    await server.stop(0)


async def test_a_stream_that_was_left_holds_its_connection_no_longer(reporting):
    """A call that waits for the garbage collector keeps its connection open, also after the channel is closed."""
    watch, made = reporting
    gc.disable()
    try:
        stream = receive_stream(watch, health_pb2.HealthCheckRequest(service="here"), timeout_s=5)
        async with contextlib.aclosing(stream) as answers:
            assert (await anext(answers)).status == health_pb2.HealthCheckResponse.SERVING
        del stream, answers
        await settled()
        assert [reference() for reference in made] == [None]
    finally:
        gc.enable()
