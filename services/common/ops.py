"""HTTP for operators and their machines: /healthz, /readyz, /metrics."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Final

import anyio
import prometheus_client
import structlog
import uvicorn
from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry

from services.common.addresses import check_address, split_address, unix_path
from services.common.health import Ready, look
from services.common.versions import PACKAGE_VERSION
from shelora.errors import InvalidConfiguration

_SHUTDOWN_TIMEOUT_S: Final = 5

_logger = structlog.get_logger(__name__)


def ops_app(ready: Ready, registry: CollectorRegistry) -> FastAPI:
    """The application; a service may add its own routes.

    /healthz answers 200 while the event loop turns. /readyz answers 200 with the details of `ready`, or 503 with code
    and message when `ready` raises or takes too long, or its details say {"ready": false}. /metrics is in
    Prometheus' text format.

    Args:
        ready: the readiness check.
        registry: the metrics.
    """
    app = FastAPI(title="SHE-LoRA operations", version=PACKAGE_VERSION, docs_url=None, redoc_url=None)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok", "version": PACKAGE_VERSION}

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        found = await look(ready)
        return JSONResponse(found, status_code=200 if found["ready"] else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(prometheus_client.generate_latest(registry), media_type=prometheus_client.CONTENT_TYPE_LATEST)

    return app


class _LoopServer(uvicorn.Server):
    """A uvicorn server that is a guest in our event loop: it touches no signal handler and says when it serves."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.serving = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.serving.set()


@contextlib.asynccontextmanager
async def serve_http(app: FastAPI, address: str) -> AsyncIterator[int]:
    """Serve an application inside the running event loop, until the block ends.

    Args:
        app: the application.
        address: host:port (port 0: any free one) or unix:path (the socket gets mode 0600).

    Yields:
        The bound port (0 for a Unix socket).

    Raises:
        InvalidConfiguration: not an address, or it cannot be bound.
    """
    listener = _listen(check_address(address))
    port = 0 if listener.family == socket.AF_UNIX else int(listener.getsockname()[1])
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=_SHUTDOWN_TIMEOUT_S,
    )
    server = _LoopServer(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        serving = asyncio.create_task(server.serving.wait())
        await asyncio.wait({task, serving}, return_when=asyncio.FIRST_COMPLETED)
        serving.cancel()
        if task.done():
            task.result()
        _logger.info("HTTP server listens", address=address, port=port)
        yield port
    finally:
        server.should_exit = True
        with anyio.CancelScope(shield=True):
            await asyncio.wait({task})
        listener.close()


def _listen(address: str) -> socket.socket:
    path = unix_path(address)
    try:
        if path is not None:
            return _listen_unix(path)
        host, port = split_address(address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise InvalidConfiguration(
            f"HTTP server: expected a free address, got {address}: {error.strerror or type(error).__name__}",
            hint="stop the process that uses it, or configure another one",
        ) from error


def _listen_unix(path: Path) -> socket.socket:
    if path.is_socket():
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    return listener
