"""Prometheus metrics that every service has."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final, cast

import grpc
import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from services.common.grpc_errors import ErrorInterceptor
from services.common.interception import around
from services.common.versions import PACKAGE_VERSION, PROTOCOL
from shelora.errors import SheLoraError

SECONDS_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
"""Bucket bounds in seconds, from a short call to a long computation."""

_MILLISECONDS: Final = 1000


def new_registry(service: str) -> CollectorRegistry:
    """A registry with the figures of the process, of the interpreter and of the build.

    Args:
        service: name of the service, a label of shelora_build_info.
    """
    registry = CollectorRegistry()
    prometheus_client.ProcessCollector(registry=registry)
    prometheus_client.PlatformCollector(registry=registry)
    build = Gauge(
        "shelora_build_info", "Version of the service; always 1.", ["service", "version", "protocol"], registry=registry
    )
    build.labels(service, PACKAGE_VERSION, str(PROTOCOL)).set(1)
    return registry


def seconds_histogram(registry: CollectorRegistry, name: str, text: str, labels: tuple[str, ...] = ()) -> Histogram:
    """A histogram of durations; the name ends in _seconds.

    Raises:
        ValueError: the name has another unit.
    """
    if not name.endswith("_seconds"):
        raise ValueError(f"metric name: expected it to end in _seconds, got {name}")
    return Histogram(name, text, labels, registry=registry, buckets=SECONDS_BUCKETS)


class RpcMetricsInterceptor(grpc.aio.ServerInterceptor):
    """Counts calls and measures their duration: shelora_rpc_seconds{method, code}, shelora_rpc_running{method}.

    Put it in front of the ErrorInterceptor, so that it sees the final status.

    Args:
        registry: where the metrics go.
        monotonic_s: seconds on a monotonic clock.
    """

    def __init__(self, registry: CollectorRegistry, monotonic_s: Callable[[], float] = time.monotonic) -> None:
        self._monotonic_s = monotonic_s
        self._seconds = seconds_histogram(registry, "shelora_rpc_seconds", "Duration of calls.", ("method", "code"))
        self._running = Gauge("shelora_rpc_running", "Calls that run now.", ["method"], registry=registry)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wrap the handler that serves the call; calls nobody serves are not counted."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method

        @contextlib.asynccontextmanager
        async def guard(context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
            started = self._monotonic_s()
            running = self._running.labels(method)
            running.inc()
            code = "CANCELLED"
            try:
                yield
                code = _code_name(context)
            except Exception:
                code = _code_name(context, default="UNKNOWN")
                raise
            finally:
                running.dec()
                self._seconds.labels(method, code).observe(self._monotonic_s() - started)

        return around(handler, guard)


def _code_name(context: grpc.aio.ServicerContext[Any, Any], default: str = "OK") -> str:
    # The stubs promise a StatusCode; the library answers its number, or 0 and None while nothing was set.
    code = cast("grpc.StatusCode | int | None", context.code())
    if isinstance(code, grpc.StatusCode):
        return code.name
    names = {status.value[0]: status.name for status in grpc.StatusCode}
    return names.get(code, default) if code else default


def bytes_counter(registry: CollectorRegistry, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
    """A counter of bytes; the name ends in _bytes.

    Raises:
        ValueError: the name has another unit.
    """
    if not name.endswith("_bytes"):
        raise ValueError(f"metric name: expected it to end in _bytes, got {name}")
    return Counter(name, text, labels, registry=registry)


def rpc_interceptors(registry: CollectorRegistry) -> list[grpc.aio.ServerInterceptor]:
    """What every service puts around its calls: metrics, then errors as statuses.

    Besides the metrics of RpcMetricsInterceptor there is shelora_errors_total{method, code}: calls that ended with an
    error, by its stable code.

    Args:
        registry: where the metrics go.
    """
    errors = Counter("shelora_errors", "Calls that ended with an error.", ["method", "code"], registry=registry)
    counting = ErrorInterceptor(on_error=lambda method, code: errors.labels(method, code).inc())
    return [RpcMetricsInterceptor(registry), counting]


def watch_certificates(registry: CollectorRegistry, ends_ms: Mapping[str, Callable[[], int]]) -> None:
    """Show when certificates end: shelora_certificate_expiry_timestamp_seconds{certificate}, asked at every scrape.

    Args:
        registry: where the metric goes.
        ends_ms: by name, what answers with the end in milliseconds since the Unix epoch; NaN is shown while it raises.
    """
    gauge = Gauge(
        "shelora_certificate_expiry_timestamp_seconds",
        "When a certificate of this service ends, in seconds since the Unix epoch.",
        ["certificate"],
        registry=registry,
    )
    for name, end_ms in ends_ms.items():
        gauge.labels(name).set_function(_or_nan(end_ms, 1 / _MILLISECONDS))


def watch_disk(registry: CollectorRegistry, folder: Path) -> None:
    """Show the disk below a folder: shelora_state_free_bytes and shelora_state_size_bytes, asked at every scrape."""
    free = Gauge("shelora_state_free_bytes", "Free bytes of the file system of the state folder.", registry=registry)
    free.set_function(_or_nan(lambda: shutil.disk_usage(folder).free))
    size = Gauge("shelora_state_size_bytes", "Size of the file system of the state folder.", registry=registry)
    size.set_function(_or_nan(lambda: shutil.disk_usage(folder).total))


def _or_nan(ask: Callable[[], float], scale: float = 1.0) -> Callable[[], float]:
    """A figure that cannot be had must not cost the others."""

    def asked() -> float:
        try:
            return ask() * scale
        except (OSError, SheLoraError):
            return math.nan

    return asked
