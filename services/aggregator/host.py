"""From a configuration to a running aggregator."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import anyio
import anyio.to_thread
import structlog
from prometheus_client import CollectorRegistry

from services.aggregator.agents import AgentLimits
from services.aggregator.compute import LocalCompute
from services.aggregator.config import AggregatorConfig
from services.aggregator.driver import Driver, DriverOptions
from services.aggregator.federation_metrics import FederationMetrics
from services.aggregator.http import http_app
from services.aggregator.metrics import MeasuredChecks, MeasuredCompute, watch_host, watch_pace, watch_pool
from services.aggregator.payloads import UploadChecks
from services.aggregator.revocations import Revocations, follow
from services.aggregator.service import AggregatorService, ServiceLimits
from services.aggregator.servicer import registration
from services.aggregator.store import MIGRATIONS
from services.aggregator.uploads import UploadLimits
from services.common.blobs import DirectoryBlobStore
from services.common.clock import Clock
from services.common.database import Database, migrate
from services.common.enrolment import Enrolment, ensure_identity, renew_forever
from services.common.files import make_folders
from services.common.health import HealthServer, Readiness
from services.common.identity import Role
from services.common.lifecycle import announced
from services.common.metrics import new_registry, rpc_interceptors
from services.common.ops import serve_http
from services.common.server import GrpcServer
from services.common.threads import WorkerPool
from services.common.tls import IdentityFiles, server_credentials
from shelora.errors import AccessDenied, IdentityConflict, InvalidConfiguration

GRACE_S: Final = 10.0
"""Seconds that running calls get at the end."""

Result = TypeVar("Result")

_log = structlog.get_logger(__name__)


async def migrate_database(config: AggregatorConfig) -> None:
    """Bring the database to the newest schema.

    Raises:
        InvalidConfiguration, StorageFull, Unavailable: the database cannot be used.
    """
    make_folders(config.state_dir, mode=0o700)
    await anyio.to_thread.run_sync(migrate, config.database, MIGRATIONS)


async def serve(config: AggregatorConfig, clock: Clock, stop: asyncio.Event, ready_file: Path | None = None) -> None:
    """Serve until `stop` is set, then drain: NOT_SERVING, running calls end, computations end, close.

    Args:
        config: the configuration.
        clock: time.
        stop: set to end.
        ready_file: written with the bound ports once everything serves; removed when draining begins.

    Raises:
        InvalidConfiguration, IdentityConflict: wrong settings, or an identity for something else.
        SheLoraError: enrolment or database failed.
    """
    make_folders(config.state_dir, mode=0o700)
    with _only_process(config.state_dir):
        files = await _unless(stop, _identity(config, clock))
        if files is None:
            return
        await migrate_database(config)
        async with _engine(config, clock) as engine:
            await engine.driver.recover()
            await _serve(config, clock, stop, ready_file, files, engine)


@dataclass(frozen=True)
class _Engine:
    """The service and what works for it."""

    registry: CollectorRegistry
    blobs: DirectoryBlobStore
    service: AggregatorService
    driver: Driver


@contextlib.asynccontextmanager
async def _engine(config: AggregatorConfig, clock: Clock) -> AsyncIterator[_Engine]:
    registry = new_registry("aggregator")
    blobs = DirectoryBlobStore(config.state_dir / "blobs")
    blobs.discard_temporary()
    # Checks of uploads never wait behind a long computation, nor the other way round.
    calls = config.limits.max_concurrent_calls
    checking, computing = WorkerPool(config.compute_threads, calls), WorkerPool(config.compute_threads, calls)
    watch_pool(registry, "checks", checking)
    watch_pool(registry, "compute", computing)
    checks = MeasuredChecks(UploadChecks(checking), registry)
    compute = MeasuredCompute(LocalCompute(blobs, computing), registry, clock)
    options = DriverOptions(config.keep_rounds, config.resume_grace_s)
    database = Database(config.database, clock=clock, registry=registry)
    try:
        service = AggregatorService(database, blobs, checks, clock, _limits(config))
        watch_pace(registry, service.pace)
        driver = Driver(service.ledger, service.hub, blobs, compute, clock, options)
        yield _Engine(registry, blobs, service, driver)
    finally:
        await database.close()


async def _serve(
    config: AggregatorConfig,
    clock: Clock,
    stop: asyncio.Event,
    ready_file: Path | None,
    files: IdentityFiles,
    engine: _Engine,
) -> None:
    service, revocations = engine.service, Revocations()

    async def ready() -> Mapping[str, Any]:
        names = await service.ledger.names()
        left_s = (files.validity_ms()[1] - clock.now_ms()) // 1000
        return {"ready": left_s > 0 and not stop.is_set(), "federations": names, "certificate_valid_s": left_s}

    server = GrpcServer(
        config.listen,
        server_credentials(files, require_client=True),
        registration(service, engine.blobs, revocations),
        rpc_interceptors(engine.registry),
        maximum_concurrent_rpcs=config.limits.max_concurrent_calls,
        window_bytes=config.limits.upload_window_bytes,
    )
    servers: dict[str, GrpcServer | HealthServer] = {"grpc": server}
    if config.health_listen is not None:
        servers["health"] = HealthServer(config.health_listen)
    watch_host(engine.registry, config.state_dir, files)
    app = http_app(service, ready, engine.registry, clock.now_ms)
    async with serve_http(app, config.ops_listen) as ops, anyio.create_task_group() as tasks:
        tasks.start_soon(engine.driver.run)
        tasks.start_soon(FederationMetrics(service, engine.registry, clock).run)
        address = _keymanager_address(config)
        if address is not None:
            tasks.start_soon(_renew, address, files, clock)
            tasks.start_soon(follow, revocations, address, files, clock)
        try:
            ports = {name: await one.start() for name, one in servers.items()} | {"ops": ops}
            async with Readiness(ready, servers.values(), clock).followed():
                with announced(ready_file, ports):
                    _log.info("aggregator serves", federation=config.federation, **ports)
                    await stop.wait()
            await _drain(server, service)
        finally:
            with anyio.CancelScope(shield=True):
                for one in servers.values():
                    await one.drain(0)
        tasks.cancel_scope.cancel()


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, Result]) -> Result | None:
    """The result of work that may take long before anything serves, or None when it was stopped before the end."""
    task, stopped = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for pending in (task, stopped):
            pending.cancel()
        await asyncio.gather(task, stopped, return_exceptions=True)


async def _drain(server: GrpcServer, service: AggregatorService) -> None:
    """Refuse new calls, tell streams to end, and finish uploads whose bytes are complete."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(server.drain, GRACE_S)
        tasks.start_soon(service.close)


@contextlib.contextmanager
def _only_process(state_dir: Path) -> Iterator[None]:
    """Hold the state folder: a second process would take the bytes that this one is writing for leftovers.

    Raises:
        InvalidConfiguration: another process holds it.
    """
    descriptor = os.open(state_dir / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidConfiguration(
                f"state_dir {state_dir}: expected to be its only user, got another running aggregator",
                hint="stop the other process, or give this one a folder of its own",
            ) from None
        yield
    finally:
        os.close(descriptor)


async def _identity(config: AggregatorConfig, clock: Clock) -> IdentityFiles:
    files = await ensure_identity(config.identity, config.enrolment_file, clock)
    found = files.identity()
    if (found.role, found.federation) != (Role.AGGREGATOR, config.federation):
        raise IdentityConflict(
            f"identity: expected an aggregator of {config.federation}, got {found.uri}",
            hint="correct `federation`, or enrol with a token of role aggregator",
        )
    return files


def _keymanager_address(config: AggregatorConfig) -> str | None:
    if config.keymanager is not None:
        return config.keymanager
    if config.enrolment_file is not None and config.enrolment_file.exists():
        return Enrolment.load(config.enrolment_file).keymanager
    _log.warning("no renewal of the certificate and no revocations: neither keymanager nor enrolment_file is there")
    return None


async def _renew(address: str, files: IdentityFiles, clock: Clock) -> None:
    try:
        await renew_forever(files, address, clock)
    except AccessDenied as error:
        # Running rounds go on until the certificate ends; readiness tells when that is.
        _log.error("the key manager refuses to renew the certificate", code=error.code, reason=str(error))


def _limits(config: AggregatorConfig) -> ServiceLimits:
    return ServiceLimits(
        agents=AgentLimits(max_agents=config.limits.max_agents),
        uploads=UploadLimits(max_payload_bytes=config.limits.max_payload_bytes),
        connected_agents=config.limits.connected_agents,
    )
