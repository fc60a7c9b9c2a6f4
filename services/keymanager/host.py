"""From a configuration to a running key manager."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import anyio.to_thread
import grpc
import structlog

from services.common.clock import Clock
from services.common.database import Database, migrate
from services.common.files import make_folders
from services.common.health import HealthServer, Readiness
from services.common.lifecycle import announced
from services.common.metrics import new_registry, rpc_interceptors
from services.common.ops import ops_app, serve_http
from services.common.server import GrpcServer
from services.common.threads import WorkerPool
from services.keymanager.ca import Authority
from services.keymanager.config import KeyManagerConfig
from services.keymanager.epoch_keys import CkksKeyMaker
from services.keymanager.metrics import watched
from services.keymanager.seal import make_key_file
from services.keymanager.server_certificate import ServerCertificate
from services.keymanager.service import KeyManager, open_authority, store_authority
from services.keymanager.servicer import enrolment_service, member_service, membership_service
from services.keymanager.store import MIGRATIONS, Records, Store
from shelora.errors import InvalidConfiguration

GRACE_S: Final = 10.0
_MEMBER_CALLS: Final = 512
_ENROLMENT_CALLS: Final = 64
_MEMBERSHIP_CALLS: Final = 64
_THREADS: Final = 1

_logger = structlog.get_logger(__name__)


@contextlib.asynccontextmanager
async def opened(config: KeyManagerConfig, clock: Clock) -> AsyncIterator[KeyManager]:
    """The key manager over its initialised state; the schema is brought up to date first.

    Raises: InvalidConfiguration when `initialise` never ran on the state_dir, or the key-encryption key is missing.
    """
    vault = config.vault()
    if not config.database_path.is_file():
        raise InvalidConfiguration(
            f"state_dir: expected a database at {config.database_path}, got none",
            hint="run `shelora-keymanager init --config FILE` once; if this state existed, check that it is mounted",
        )
    await anyio.to_thread.run_sync(migrate, config.database_url, MIGRATIONS)
    database = Database(config.database_url, clock=clock)
    try:
        store = Store(database)
        authority = await store.run_tx("authority", lambda records: open_authority(records, vault, config.federation))
        yield KeyManager(
            authority=authority,
            store=store,
            vault=vault,
            keys=CkksKeyMaker(),
            pool=WorkerPool(_THREADS),
            clock=clock,
            certificate_lifetime_s=config.certificate_lifetime_s,
            addresses=config.advertised,
        )
    finally:
        await database.close()


async def initialise(config: KeyManagerConfig, clock: Clock) -> int:
    """Make what is missing of key-encryption key, database, certificate authority and first epoch.

    Returns: the number of the current epoch.
    """
    if config.kek is None:
        if config.database_path.is_file() and not config.kek_file.exists():
            config.vault()  # raises: a new key would open nothing that is stored
        make_key_file(config.kek_file)
    vault = config.vault()
    make_folders(config.state_dir, 0o700)
    await anyio.to_thread.run_sync(migrate, config.database_url, MIGRATIONS)
    config.database_path.chmod(0o600)
    database = Database(config.database_url, clock=clock)

    async def body(records: Records) -> None:
        if await records.authority() is None:
            await store_authority(records, vault, Authority.create(config.federation, clock.now_ms()))

    try:
        await Store(database).run_tx("initialise", body)
    finally:
        await database.close()
    async with opened(config, clock) as keymanager:
        epochs = await keymanager.list_epochs(None)
        return epochs[0].number if epochs else (await keymanager.rotate_epoch(None, "first epoch")).number


async def serve(config: KeyManagerConfig, clock: Clock, stop: asyncio.Event, ready_file: Path | None = None) -> None:
    """Serve until `stop` is set, then drain.

    Args:
        config: the configuration.
        clock: time.
        stop: set to end.
        ready_file: written with the bound ports once everything serves; removed when draining begins.
    """
    async with opened(config, clock) as keymanager, contextlib.AsyncExitStack() as stack:
        epoch = await keymanager.check_current_keys()
        registry = new_registry("keymanager")
        await stack.enter_async_context(watched(keymanager, registry, config.state_dir, clock))

        async def ready() -> Mapping[str, Any]:
            return {**await keymanager.ready(), "ready": not stop.is_set()}

        ports = {"ops": await stack.enter_async_context(serve_http(ops_app(ready, registry), config.ops_listen))}
        working = _servers(config, keymanager, rpc_interceptors(registry), clock)
        servers: dict[str, GrpcServer | HealthServer] = {**working}
        if config.health_listen is not None:
            servers["health"] = HealthServer(config.health_listen)
        for name, server in servers.items():
            stack.push_async_callback(server.drain, 0)
            ports[name] = await server.start()
        async with Readiness(ready, servers.values(), clock).followed():
            with announced(ready_file, ports):
                _logger.info("key manager serves", federation=keymanager.federation, epoch=epoch, **ports)
                await stop.wait()
        await asyncio.gather(*(server.drain(GRACE_S) for server in working.values()))


def _servers(
    config: KeyManagerConfig, keymanager: KeyManager, interceptors: Sequence[grpc.aio.ServerInterceptor], clock: Clock
) -> dict[str, GrpcServer]:
    """The ports with TLS, by their name in the ready file."""
    certificate = ServerCertificate(keymanager.authority, config.server_names, config.certificate_lifetime_s, clock)
    return {
        "grpc": GrpcServer(
            config.listen,
            certificate.credentials(require_client=True),
            member_service(keymanager),
            interceptors,
            maximum_concurrent_rpcs=_MEMBER_CALLS,
        ),
        "membership": GrpcServer(
            config.membership_listen,
            certificate.credentials(require_client=True),
            membership_service(keymanager),
            interceptors,
            maximum_concurrent_rpcs=_MEMBERSHIP_CALLS,
        ),
        "enrolment": GrpcServer(
            config.enrolment_listen,
            certificate.credentials(require_client=False),
            enrolment_service(keymanager),
            interceptors,
            maximum_concurrent_rpcs=_ENROLMENT_CALLS,
        ),
    }
