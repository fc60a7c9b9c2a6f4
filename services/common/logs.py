"""Structured logs: constant messages with fields, JSON when nobody watches."""

from __future__ import annotations

import contextlib
import logging
import secrets
import sys
from collections.abc import Iterator, MutableMapping
from typing import Any, TextIO

import structlog

_QUIET = ("uvicorn.access", "grpc", "grpc._cython.cygrpc", "alembic.runtime.migration", "asyncio")


def new_correlation_id() -> str:
    """A fresh random id of 16 hexadecimal characters that ties log lines of one call together."""
    return secrets.token_hex(8)


@contextlib.contextmanager
def bound_ids(**fields: str) -> Iterator[None]:
    """Add fields (agent, round, correlation_id, ...) to every log line of the running task inside the block."""
    with structlog.contextvars.bound_contextvars(**fields):
        yield


def redact(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Log processor: replace bytes and arrays by their length, so that no payload or key reaches a log by mistake."""
    for key, value in event.items():
        if isinstance(value, bytes | bytearray | memoryview):
            event[key] = f"<{len(value)} bytes>"
        elif hasattr(value, "shape") and hasattr(value, "dtype"):
            event[key] = f"<array of shape {tuple(value.shape)}>"
    return event


def configure_logs(
    service: str, *, level: str = "info", json: bool | None = None, stream: TextIO | None = None
) -> None:
    """Send structlog and the standard library's logs to one stream in one form.

    Args:
        service: name of the service, added to every line.
        level: lowest level to show: debug, info, warning or error.
        json: one JSON object a line; None means JSON unless the stream is a terminal.
        stream: where to; None means standard error.
    """
    target = sys.stderr if stream is None else stream
    as_json = not target.isatty() if json is None else json

    def add_service(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        event.setdefault("service", service)
        return event

    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        add_service,
        redact,
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.processors.StackInfoRenderer(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    ending: list[structlog.typing.Processor] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta]
    if as_json:
        ending += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(sort_keys=True)]
    else:
        ending += [structlog.dev.ConsoleRenderer(colors=target.isatty())]
    handler = logging.StreamHandler(target)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=ending))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
