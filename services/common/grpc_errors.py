"""The one seam between the error tree and gRPC statuses."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, Final

import grpc
import structlog
from google.protobuf import duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped] # ships no type information

from services.common.files import FULL
from services.common.interception import around
from services.common.logs import bound_ids, new_correlation_id
from shelora import errors

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

DOMAIN: Final = "shelora"
RETRY_AFTER: Final = "retry_after_s"
"""Key in an error's context: seconds the server asks the caller to wait before the next try."""

_DETAILS_KEY: Final = "grpc-status-details-bin"
_CONTEXT: Final = "context-"
# Trailing metadata beyond 8 KiB may be dropped on the way; the message travels twice, once percent-encoded.
_MESSAGE_CHARACTERS: Final = 1000
_HINT_CHARACTERS: Final = 400
_CONTEXT_ENTRIES: Final = 12
_CONTEXT_CHARACTERS: Final = 120
_EXHAUSTED_WAIT_S: Final = 5.0
_UNAVAILABLE_WAIT_S: Final = 1.0

CODES: Final[dict[type[errors.SheLoraError], grpc.StatusCode]] = {
    errors.SheLoraError: grpc.StatusCode.UNKNOWN,
    errors.MalformedInput: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.Conflict: grpc.StatusCode.ALREADY_EXISTS,
    errors.WrongState: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Exhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.AccessDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.NotAuthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.CorruptState: grpc.StatusCode.DATA_LOSS,
    errors.InternalFault: grpc.StatusCode.INTERNAL,
}
"""Status code of each branch of the tree; a class not listed has the code of its nearest listed ancestor."""

_CLASSES: Final[dict[grpc.StatusCode, type[errors.SheLoraError]]] = {
    **{code: cls for cls, code in CODES.items()},
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.PeerUnreachable,
    grpc.StatusCode.UNAVAILABLE: errors.PeerUnreachable,
    grpc.StatusCode.CANCELLED: errors.PeerUnreachable,
    grpc.StatusCode.UNIMPLEMENTED: errors.VersionMismatch,
    grpc.StatusCode.OUT_OF_RANGE: errors.MalformedInput,
    grpc.StatusCode.ABORTED: errors.Unavailable,
    grpc.StatusCode.UNKNOWN: errors.InternalFault,
}

_logger = structlog.get_logger(__name__)


def status_code(cls: type[errors.SheLoraError]) -> grpc.StatusCode:
    """The gRPC status code of an error class."""
    return next(CODES[base] for base in cls.__mro__ if base in CODES)


def retry_after_s(error: errors.SheLoraError) -> float | None:
    """Seconds the other side asked to wait before the next try, or None if it asked for nothing."""
    try:
        seconds = float(error.context[RETRY_AFTER])
    except (KeyError, ValueError):
        return None
    return seconds if 0 <= seconds < float("inf") else None


def status_of(error: errors.SheLoraError) -> status_pb2.Status:
    """The error as a google.rpc.Status.

    Its details are an ErrorInfo (domain "shelora", reason = the code in upper case, metadata = hint, retryable, and
    the context with its keys prefixed by "context-") and, for Exhausted and Unavailable, a RetryInfo. Long texts are
    cut so that the trailer fits.
    """
    info = error_details_pb2.ErrorInfo(domain=DOMAIN, reason=error.code.upper())
    info.metadata["hint"] = error.hint[:_HINT_CHARACTERS]
    info.metadata["retryable"] = "true" if error.retryable else "false"
    entries = [(key, value) for key, value in error.context.items() if key != RETRY_AFTER]
    for key, value in entries[:_CONTEXT_ENTRIES]:
        info.metadata[_CONTEXT + key[:_CONTEXT_CHARACTERS]] = str(value)[:_CONTEXT_CHARACTERS]
    status = status_pb2.Status(code=status_code(type(error)).value[0], message=error.message[:_MESSAGE_CHARACTERS])
    status.details.add().Pack(info)
    wait_s = retry_after_s(error)
    if wait_s is None and isinstance(error, errors.Exhausted):
        wait_s = _EXHAUSTED_WAIT_S
    elif wait_s is None and isinstance(error, errors.Unavailable):
        wait_s = _UNAVAILABLE_WAIT_S
    if wait_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(min(wait_s, 86_400.0) * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return status


def error_from_rpc(rpc_error: grpc.aio.AioRpcError) -> errors.SheLoraError:
    """Rebuild the error that the other side raised.

    Args:
        rpc_error: what a stub raised.

    Returns:
        The same class with message, hint and context, when the status carries our details; the delay of a RetryInfo
        is added to the context under `RETRY_AFTER`. A code this release does not know becomes the branch of its
        status code. Without details: UNAVAILABLE, DEADLINE_EXCEEDED and CANCELLED become PeerUnreachable, the others
        the branch of their status code.
    """
    status = _status_details(rpc_error)
    info = error_details_pb2.ErrorInfo()
    wait = error_details_pb2.RetryInfo()
    found = False
    for detail in status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR) and not found:
            detail.Unpack(info)
            found = info.domain == DOMAIN
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            detail.Unpack(wait)
    if not found:
        return _foreign_error(rpc_error)
    cls = errors.error_classes().get(info.reason.lower()) or _CLASSES[rpc_error.code()]
    context = {key[len(_CONTEXT) :]: value for key, value in sorted(info.metadata.items()) if key.startswith(_CONTEXT)}
    if wait.HasField("retry_delay"):
        context[RETRY_AFTER] = f"{wait.retry_delay.ToNanoseconds() / 1e9:g}"
    return cls(status.message, hint=info.metadata.get("hint", ""), context=context)


def _status_details(rpc_error: grpc.aio.AioRpcError) -> status_pb2.Status:
    for key, value in rpc_error.trailing_metadata() or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                break
    return status_pb2.Status()


def is_write_failure(rpc_error: grpc.aio.AioRpcError) -> bool:
    """Whether this is grpc.aio's own status for a write on a call that has ended, sent by nobody."""
    return rpc_error.code() is grpc.StatusCode.INTERNAL and rpc_error.details() == "Internal error from Core"


def _foreign_error(rpc_error: grpc.aio.AioRpcError) -> errors.SheLoraError:
    """The error for a status that gRPC itself, a proxy or a foreign server produced."""
    code = rpc_error.code()
    details = (rpc_error.details() or "no details")[:_MESSAGE_CHARACTERS]
    message = f"{code.name.lower().replace('_', ' ')}: {details}"
    cls = _CLASSES.get(code, errors.InternalFault)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
        cls = errors.PayloadTooLarge
    elif is_write_failure(rpc_error) or (code is grpc.StatusCode.INTERNAL and "RST_STREAM" in details):
        cls = errors.PeerUnreachable
    hint = {
        errors.PeerUnreachable: "check address, certificates and whether the service runs; the call may be repeated",
        errors.VersionMismatch: "the other side does not know this call; install the same release on both sides",
    }.get(cls, "")
    return cls(message, hint=hint)


def translate(error: BaseException) -> errors.SheLoraError | None:
    """The documented error behind an exception, or None when there is none.

    Looks through exception groups, and turns a full disk, an exhausted quota of the file system or a full SQLite
    database into StorageFull.
    """
    if isinstance(error, errors.SheLoraError):
        return error
    if isinstance(error, BaseExceptionGroup):
        found = [translate(member) for member in error.exceptions]
        return None if None in found else next(iter(found), None)
    full = isinstance(error, OSError) and error.errno in FULL
    full = full or (type(error).__name__ == "OperationalError" and "disk is full" in str(error))
    if full:
        return errors.StorageFull(
            "storage: expected free space for the write, got a full disk",
            hint="free space on the service's disk; the call may then be repeated as it is",
        )
    return None


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns exceptions of handlers into statuses and gives every call a correlation id in its log lines.

    Errors of the tree keep their class on the way to the caller. Cancellation and aborts pass. Anything else is
    logged with its traceback and reaches the caller as INTERNAL with the correlation id and nothing more.

    Args:
        new_id: makes a correlation id.
        on_error: told the method and the stable code of every error that a call ends with.
    """

    def __init__(
        self,
        new_id: Callable[[], str] = new_correlation_id,
        on_error: Callable[[str, str], None] = lambda _method, _code: None,
    ) -> None:
        self._new_id = new_id
        self._on_error = on_error

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wrap the handler that serves the call."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method

        @contextlib.asynccontextmanager
        async def guard(context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
            correlation_id = self._new_id()
            with bound_ids(correlation_id=correlation_id, rpc=method):
                try:
                    yield
                except grpc.aio.AbortError:
                    raise
                except Exception as error:
                    documented = _documented(error, correlation_id)
                    self._on_error(method, documented.code)
                    await _abort(context, documented)

        return around(handler, guard)


def _documented(error: Exception, correlation_id: str) -> errors.SheLoraError:
    known = translate(error)
    if known is None:
        _logger.error("call failed unexpectedly", exc_info=error)
        return errors.InternalFault(
            "internal fault",
            hint="find the correlation id in the service's log",
            context={"correlation_id": correlation_id},
        )
    fields = {"code": known.code, "reason": known.message, **{f"at_{key}": known.context[key] for key in known.context}}
    if isinstance(known, errors.CorruptState | errors.InternalFault):
        _logger.error("call failed", exc_info=error, **fields)
    else:
        _logger.info("call refused", **fields)
    return known


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: errors.SheLoraError) -> None:
    status = status_of(error)
    await context.abort(status_code(type(error)), status.message, ((_DETAILS_KEY, status.SerializeToString()),))


def reasons(classes: Iterable[type[errors.SheLoraError]]) -> dict[str, grpc.StatusCode]:
    """Error code to gRPC status code, for documentation and dashboards."""
    return {cls.code: status_code(cls) for cls in classes}
