"""Client side of gRPC: channels and calls."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Coroutine, Mapping
from typing import Any, Final

import grpc

from services.common.addresses import check_address, check_local, is_local
from services.common.grpc_errors import error_from_rpc, is_write_failure

IDEMPOTENT: Final[dict[str, tuple[str, ...]]] = {
    "shelora.v1.EnrolmentService": ("Enrol",),
    "shelora.v1.MembershipService": ("ListRevocations",),
    "shelora.v1.KeyManagerService": ("FetchEpoch", "ListEpochs", "ListAuditRecords"),
    "shelora.v1.FederationService": (
        "CreateFederation",
        "GetFederation",
        "ListFederations",
        "ListAgents",
        "ListRounds",
    ),
    "shelora.v1.RoundService": ("GetTerms", "RegisterAgent", "GetUpload", "ReportRound", "LeaveRound"),
    "shelora.v1.AgentControlService": ("GetStatus",),
}
"""Calls that gRPC repeats by itself when nothing of an answer came: doing them twice is the same as once."""

_RETRY_POLICY: Final = {
    "maxAttempts": 4,
    "initialBackoff": "0.2s",
    "maxBackoff": "2s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}
SERVICE_CONFIG: Final = json.dumps(
    {
        "methodConfig": [
            {
                "name": [
                    {"service": service, "method": method} for service, names in IDEMPOTENT.items() for method in names
                ],
                "retryPolicy": _RETRY_POLICY,
            }
        ]
    }
)
_OPTIONS: Final[tuple[tuple[str, str | int], ...]] = (
    ("grpc.service_config", SERVICE_CONFIG),
    ("grpc.enable_retries", 1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.initial_reconnect_backoff_ms", 300),
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 10_000),
    # Connections are never shared between channels: a new channel after a renewal shall use the new certificate.
    ("grpc.use_local_subchannel_pool", 1),
)


def open_channel(
    address: str, credentials: grpc.ChannelCredentials | None, *, server_name: str | None = None
) -> grpc.aio.Channel:
    """Open a channel; it connects at the first call and reconnects by itself.

    Args:
        address: host:port or unix:path.
        credentials: TLS; None is for Unix sockets and loopback addresses only.
        server_name: name expected in the server's certificate when it differs from the address's host.

    Returns:
        A channel with keepalive, retries of idempotent unary calls, and gRPC's default message limits. The caller
        closes it.

    Raises:
        InvalidConfiguration: not an address, or no credentials for an address that can be reached from elsewhere.
    """
    check_address(address)
    options: list[tuple[str, str | int]] = list(_OPTIONS)
    if is_local(address):
        options.append(("grpc.enable_http_proxy", 0))
    if credentials is None:
        check_local(address, "channel")
        return grpc.aio.insecure_channel(address, options=options)
    if server_name is not None:
        options.append(("grpc.ssl_target_name_override", server_name))
    return grpc.aio.secure_channel(address, credentials, options=options)


async def call(method: Any, request: Any, *, timeout_s: float) -> Any:
    """Make a unary call with a deadline.

    Args:
        method: a unary-unary member of a stub.
        request: the request message.
        timeout_s: longest wait in seconds, retries of the channel included.

    Returns:
        The response message.

    Raises:
        SheLoraError: what the other side raised, or PeerUnreachable when no answer came in time.
    """
    try:
        return await method(request, timeout=timeout_s)
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from error


async def receive_stream(method: Any, request: Any, *, timeout_s: float | None) -> AsyncGenerator[Any, None]:
    """Make a call whose answer is a stream.

    Args:
        method: a unary-stream member of a stub.
        request: the request message.
        timeout_s: longest time for the whole stream in seconds; None for streams that stay open.

    Yields:
        The response messages. Leaving the loop early and closing the generator cancels the call.

    Raises:
        SheLoraError: what the other side raised, or PeerUnreachable when the stream broke.
    """
    stream = method(request, timeout=timeout_s)
    messages = stream.__aiter__()
    try:
        async for message in messages:
            yield message
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from error
    finally:
        stream.cancel()
        # Otherwise it and the call hold each other, and the channel's connection stays until they are collected.
        await messages.aclose()


async def send_stream(
    method: Any,
    requests: AsyncIterable[Any],
    *,
    timeout_s: float | None,
    asked: Callable[[Mapping[str, Any]], object] | None = None,
) -> Any:
    """Make a call whose request is a stream; each message is made while the one before it is on its way.

    Args:
        method: a stream-unary member of a stub.
        requests: the request messages; an exception in it cancels the call and is raised here as it is.
        timeout_s: longest time for the whole call in seconds.
        asked: called with the other side's initial metadata, before the second message is made; without, nobody waits.

    Returns:
        The response message; it may come before all requests are sent.

    Raises:
        SheLoraError: what the other side raised, or PeerUnreachable when the stream broke.
    """
    stream = method(timeout=timeout_s)
    ends = _Ends(stream)
    writing: asyncio.Future[bool] | None = None
    try:
        async for message in requests:
            if writing is not None and not await writing:
                break
            writing = asyncio.ensure_future(_written(stream.write(message)))
            await asyncio.sleep(0)  # The write begins.
            if asked is not None:
                if not await writing:
                    break
                asked(dict(await stream.initial_metadata()))
                asked = None
        else:
            if writing is None or await writing:
                await _written(stream.done_writing())
        return await stream
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(ends.from_peer(error)) from error
    finally:
        stream.cancel()
        if writing is not None:
            writing.cancel()


async def _written(writing: Awaitable[None]) -> bool:
    """Whether a write went through; False when the call is over, whose answer or status then follows."""
    try:
        await writing
    except (asyncio.InvalidStateError, grpc.aio.AioRpcError):
        return False
    return True


class _Ends:
    """Every status that a call reported, in order.

    A write that fails because the other side has just ended the call makes grpc.aio overwrite the received status by
    its own INTERNAL (github.com/grpc/grpc/issues/36066). A callback sees each status at the moment it is set.
    """

    def __init__(self, stream: Any) -> None:
        self._seen: list[grpc.aio.AioRpcError] = []
        stream.add_done_callback(self._note)

    def _note(self, stream: Any) -> None:
        code, details, trailer = (_at_once(part()) for part in (stream.code, stream.details, stream.trailing_metadata))
        if code is not grpc.StatusCode.OK:
            self._seen.append(grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailer, details=details))

    def from_peer(self, error: grpc.aio.AioRpcError) -> grpc.aio.AioRpcError:
        """The status that the other side sent, or the given one when none came."""
        if not is_write_failure(error):
            return error
        return next((seen for seen in self._seen if not is_write_failure(seen)), error)


def _at_once(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that has nothing to wait for."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    coroutine.close()
    raise AssertionError("a finished call answers at once")
