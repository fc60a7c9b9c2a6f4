"""Every error of the tree goes through a real gRPC server and comes back as itself."""

from __future__ import annotations

import asyncio
import errno
import sqlite3
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest
import structlog
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped] # ships no type information
from hypothesis import given
from hypothesis import strategies as st

from services.common.channel import call, open_channel, receive_stream, send_stream
from services.common.grpc_errors import (
    CODES,
    RETRY_AFTER,
    ErrorInterceptor,
    error_from_rpc,
    reasons,
    retry_after_s,
    status_code,
    status_of,
    translate,
)
from services.common.server import GrpcServer
from shelora import errors

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup

CLASSES = sorted(errors.error_classes().values(), key=lambda cls: cls.code)
KINDS = ("unary_unary", "unary_stream", "unary_stream_by_write", "stream_unary", "stream_stream")


class Failing:
    """A service whose every method raises what the test put into `error`, streams after one message."""

    def __init__(self) -> None:
        self.error: BaseException = AssertionError("the test sets no error")
        self.closed = asyncio.Event()
        self.asked = asyncio.Event()
        self.port = 0

    async def unary_unary(self, request: bytes, context: Any) -> bytes:
        raise self.error

    async def unary_stream(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        try:
            yield b"first"
            if request == b"forever":
                await asyncio.Event().wait()
            raise self.error
        finally:
            self.closed.set()

    async def unary_stream_by_write(self, request: bytes, context: Any) -> None:
        await context.write(b"first")
        raise self.error

    async def stream_unary(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        async for _ in requests:
            raise self.error
        return b"no request came"

    async def answer_early(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        return await anext(aiter(requests))

    async def ask(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        messages = aiter(requests)
        first = await anext(messages)
        await asyncio.sleep(0.2)
        self.asked.set()
        await context.send_initial_metadata((("begin", "7"),))
        return b" ".join([first, *[message async for message in messages]])

    async def stream_stream(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request
            raise self.error

    async def abort(self, request: bytes, context: Any) -> None:
        await context.abort(grpc.StatusCode.OUT_OF_RANGE, "aborted by hand")

    def register(self, server: grpc.aio.Server) -> None:
        handlers: dict[str, Any] = {
            "unary_unary": grpc.unary_unary_rpc_method_handler(self.unary_unary),
            "unary_stream": grpc.unary_stream_rpc_method_handler(self.unary_stream),
            "unary_stream_by_write": grpc.unary_stream_rpc_method_handler(self.unary_stream_by_write),
            "stream_unary": grpc.stream_unary_rpc_method_handler(self.stream_unary),
            "stream_stream": grpc.stream_stream_rpc_method_handler(self.stream_stream),
            "ask": grpc.stream_unary_rpc_method_handler(self.ask),
            "answer_early": grpc.stream_unary_rpc_method_handler(self.answer_early),
            "abort": grpc.unary_unary_rpc_method_handler(self.abort),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Failing", handlers),))


@pytest.fixture
async def failing() -> AsyncIterator[Failing]:
    servicer = Failing()
    ids = iter(f"id-{number}" for number in range(1_000))
    server = GrpcServer("127.0.0.1:0", None, servicer.register, [ErrorInterceptor(new_id=lambda: next(ids))])
    servicer.port = await server.start()
    yield servicer
    await server.drain(0)


@pytest.fixture
async def channel(failing: Failing) -> AsyncIterator[grpc.aio.Channel]:
    channel = open_channel(f"127.0.0.1:{failing.port}", None)
    yield channel
    await channel.close()


async def invoke(channel: grpc.aio.Channel, kind: str, request: bytes = b"x") -> list[bytes]:
    """Call one method of Failing through the calls that the services use."""
    path = f"/test.Failing/{kind}"

    async def one() -> AsyncIterator[bytes]:
        yield request

    if kind in {"unary_unary", "abort"}:
        return [await call(channel.unary_unary(path), request, timeout_s=10)]
    if kind.startswith("unary_stream"):
        return [m async for m in receive_stream(channel.unary_stream(path), request, timeout_s=10)]
    if kind == "stream_unary":
        return [await send_stream(channel.stream_unary(path), one(), timeout_s=10)]
    method: Any = channel.stream_stream(path)
    stream = method(one(), timeout=10)
    try:
        return [message async for message in stream]
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from error


@pytest.mark.parametrize("kind", KINDS)
async def test_every_class_comes_back_as_itself(failing: Failing, channel: grpc.aio.Channel, kind: str) -> None:
    for cls in CLASSES:
        failing.error = cls(
            f"{cls.code}: expected größer than 1, got 0", hint="try → 1", context={"round": "3", "agent": "agent-1"}
        )
        with pytest.raises(errors.SheLoraError) as caught:
            await invoke(channel, kind)
        error = caught.value
        assert type(error) is cls
        assert error.message == failing.error.message
        assert (error.hint, error.retryable) == ("try → 1", cls.retryable)
        waits = {RETRY_AFTER} if issubclass(cls, errors.Exhausted | errors.Unavailable) else set()
        assert set(error.context) == {"round", "agent"} | waits
        assert (error.context["round"], error.context["agent"]) == ("3", "agent-1")
        cause = error.__cause__
        assert isinstance(cause, grpc.aio.AioRpcError)
        assert cause.code() is status_code(cls)


def test_every_branch_of_the_tree_has_a_status_code() -> None:
    assert set(errors.SheLoraError.__subclasses__()) | {errors.SheLoraError} == set(CODES)
    table = reasons(CLASSES)
    assert table["wrong_phase"] is grpc.StatusCode.FAILED_PRECONDITION
    assert table["conflicting_resend"] is grpc.StatusCode.ALREADY_EXISTS
    assert table["residue_out_of_range"] is grpc.StatusCode.INVALID_ARGUMENT
    assert table["storage_full"] is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert table["stored_bytes_corrupt"] is grpc.StatusCode.DATA_LOSS
    assert table["draining"] is grpc.StatusCode.UNAVAILABLE
    assert len(table) == len(CLASSES)


async def test_a_server_may_ask_for_a_longer_wait(failing: Failing, channel: grpc.aio.Channel) -> None:
    failing.error = errors.QuotaExceeded("expected fewer", context={RETRY_AFTER: "42.5"})
    with pytest.raises(errors.QuotaExceeded) as caught:
        await invoke(channel, "unary_unary")
    assert retry_after_s(caught.value) == 42.5
    assert retry_after_s(errors.QuotaExceeded("x")) is None
    assert retry_after_s(errors.QuotaExceeded("x", context={RETRY_AFTER: "nan"})) is None
    assert retry_after_s(errors.QuotaExceeded("x", context={RETRY_AFTER: "soon"})) is None


@pytest.mark.parametrize("kind", KINDS)
async def test_defects_reach_the_caller_as_a_correlation_id_only(
    failing: Failing, channel: grpc.aio.Channel, kind: str
) -> None:
    failing.error = ValueError("a secret detail")
    with structlog.testing.capture_logs() as logs, pytest.raises(errors.InternalFault) as caught:
        await invoke(channel, kind)
    assert caught.value.context == {"correlation_id": "id-0"}
    assert "secret" not in str(caught.value)
    (line,) = [line for line in logs if line["log_level"] == "error"]
    assert line["event"] == "call failed unexpectedly"
    assert line["exc_info"] is failing.error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        sqlite3.OperationalError("database or disk is full"),
        ExceptionGroup("tasks", [OSError(errno.ENOSPC, "No space left on device")]),
    ],
)
async def test_a_full_disk_is_refused_as_such(failing: Failing, channel: grpc.aio.Channel, error: Exception) -> None:
    failing.error = error
    with pytest.raises(errors.StorageFull, match="full disk"):
        await invoke(channel, "unary_unary")


def test_groups_are_looked_through_only_when_all_members_are_known() -> None:
    known = errors.WrongPhase("x")
    assert translate(ExceptionGroup("g", [ExceptionGroup("h", [known])])) is known
    assert translate(ExceptionGroup("g", [known, ValueError("y")])) is None
    assert translate(OSError(errno.EACCES, "Permission denied")) is None


async def test_aborts_of_handlers_pass(channel: grpc.aio.Channel) -> None:
    with pytest.raises(errors.MalformedInput, match="out of range: aborted by hand"):
        await invoke(channel, "abort")


async def test_leaving_a_stream_ends_its_handler(failing: Failing, channel: grpc.aio.Channel) -> None:
    stream = receive_stream(channel.unary_stream("/test.Failing/unary_stream"), b"forever", timeout_s=None)
    assert await anext(stream) == b"first"
    assert not failing.closed.is_set()
    await stream.aclose()
    await asyncio.wait_for(failing.closed.wait(), 10)


async def test_an_error_while_sending_cancels_the_call(channel: grpc.aio.Channel) -> None:
    async def requests() -> AsyncIterator[bytes]:
        raise errors.StorageFull("cannot read the payload")
        yield b""

    with pytest.raises(errors.StorageFull, match="cannot read"):
        await send_stream(channel.stream_unary("/test.Failing/stream_unary"), requests(), timeout_s=10)


async def test_a_sender_may_wait_until_it_is_asked(failing: Failing, channel: grpc.aio.Channel) -> None:
    told: list[Any] = []

    async def requests() -> AsyncIterator[bytes]:
        yield b"first"
        assert failing.asked.is_set()
        assert [metadata["begin"] for metadata in told] == ["7"]
        yield b"second"

    method: Any = channel.stream_unary("/test.Failing/ask")
    assert await send_stream(method, requests(), timeout_s=10, asked=told.append) == b"first second"


@pytest.mark.parametrize("asked", [None, dict])
@pytest.mark.parametrize("repetition", range(10))
async def test_an_early_refusal_reaches_a_sender_that_still_sends(
    failing: Failing, channel: grpc.aio.Channel, repetition: int, asked: Any
) -> None:
    failing.error = errors.PayloadTooLarge("expected less")

    async def requests() -> AsyncIterator[bytes]:
        for _ in range(2_000):
            yield bytes(65_536)

    method: Any = channel.stream_unary("/test.Failing/stream_unary")
    with pytest.raises(errors.PayloadTooLarge, match="expected less"):
        await send_stream(method, requests(), timeout_s=30, asked=asked)


@pytest.mark.parametrize("asked", [None, dict])
@pytest.mark.parametrize("repetition", range(10))
async def test_an_early_answer_reaches_a_sender_that_still_sends(
    channel: grpc.aio.Channel, repetition: int, asked: Any
) -> None:
    async def requests() -> AsyncIterator[bytes]:
        yield b"first"
        for _ in range(2_000):
            yield bytes(65_536)

    method: Any = channel.stream_unary("/test.Failing/answer_early")
    answer = await send_stream(method, requests(), timeout_s=30, asked=asked)
    assert answer == b"first"


async def test_nobody_there_and_unknown_calls(channel: grpc.aio.Channel) -> None:
    with pytest.raises(errors.VersionMismatch, match="unimplemented") as unknown:
        await invoke(channel, "unary_stream_of_the_future")
    assert "same release" in unknown.value.hint
    lonely = open_channel("127.0.0.1:1", None)
    with pytest.raises(errors.PeerUnreachable) as absent:
        await invoke(lonely, "unary_unary")
    assert absent.value.retryable
    await lonely.close()


async def test_a_deadline_is_an_unreachable_peer(channel: grpc.aio.Channel) -> None:
    with pytest.raises(errors.PeerUnreachable, match="deadline exceeded"):
        async for _ in receive_stream(channel.unary_stream("/test.Failing/unary_stream"), b"forever", timeout_s=0.2):
            pass


async def test_an_oversized_message_is_refused(channel: grpc.aio.Channel) -> None:
    with pytest.raises(errors.PayloadTooLarge, match="larger than max"):
        await invoke(channel, "unary_unary", bytes(5 << 20))


def rpc_error(code: grpc.StatusCode, details: str | None, *trailer: tuple[str, Any]) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailer), details=details)


def packed(*details: Any, message: str = "text") -> tuple[str, bytes]:
    status = status_pb2.Status(code=9, message=message)
    for detail in details:
        status.details.add().Pack(detail)
    return ("grpc-status-details-bin", status.SerializeToString())


def test_codes_of_a_newer_release_become_their_branch() -> None:
    info = error_details_pb2.ErrorInfo(domain="shelora", reason="NEWER_THAN_US", metadata={"hint": "update"})
    error = error_from_rpc(rpc_error(grpc.StatusCode.FAILED_PRECONDITION, "text", packed(info)))
    assert type(error) is errors.WrongState
    assert (error.message, error.hint, error.context) == ("text", "update", {})


@pytest.mark.parametrize(
    ("code", "details", "cls"),
    [
        (grpc.StatusCode.UNAUTHENTICATED, None, errors.NotAuthenticated),
        (grpc.StatusCode.PERMISSION_DENIED, "", errors.AccessDenied),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "Concurrent RPC limit exceeded!", errors.Exhausted),
        (grpc.StatusCode.CANCELLED, "x", errors.PeerUnreachable),
        (grpc.StatusCode.INTERNAL, "Received RST_STREAM with error code 2", errors.PeerUnreachable),
        (grpc.StatusCode.INTERNAL, "Internal error from Core", errors.PeerUnreachable),
        (grpc.StatusCode.INTERNAL, "x", errors.InternalFault),
        (grpc.StatusCode.UNKNOWN, "x", errors.InternalFault),
        (grpc.StatusCode.ABORTED, "x", errors.Unavailable),
    ],
)
def test_foreign_statuses(code: grpc.StatusCode, details: str | None, cls: type[errors.SheLoraError]) -> None:
    foreign = error_details_pb2.ErrorInfo(domain="example.org", reason="WRONG_PHASE")
    for trailer in ((), (packed(foreign),), (("grpc-status-details-bin", b"\xff\xff"),), (packed(any_pb2.Any()),)):
        assert type(error_from_rpc(rpc_error(code, details, *trailer))) is cls


@given(payload=st.binary(max_size=200))
def test_hostile_details_never_raise(payload: bytes) -> None:
    error = error_from_rpc(rpc_error(grpc.StatusCode.NOT_FOUND, "x", ("grpc-status-details-bin", payload)))
    assert isinstance(error, errors.SheLoraError)


async def test_endless_texts_still_fit_the_trailer(failing: Failing, channel: grpc.aio.Channel) -> None:
    context = {f"key{number}" * 50: "w" * 5_000 for number in range(100)}
    failing.error = errors.InvalidPlan("é" * 100_000, hint="h" * 10_000, context=context)
    with pytest.raises(errors.InvalidPlan) as caught:
        await invoke(channel, "unary_unary")
    assert 500 <= len(caught.value.message) <= 1_000
    assert len(status_of(failing.error).SerializeToString()) < 8_192


@pytest.fixture(autouse=True)
def _plain_logs() -> Iterator[None]:
    structlog.reset_defaults()
    yield
    structlog.reset_defaults()
