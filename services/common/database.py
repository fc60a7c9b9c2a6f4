"""Transactions on SQLite or PostgreSQL through one door.

The SQL itself belongs to the `store` module of each service; here are the engine, the retries and the migrations.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, TypeAlias, TypeVar

import alembic.command
import alembic.config
import alembic.context
import prometheus_client
import sqlalchemy
import structlog
from sqlalchemy import exc, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from services.common.clock import Clock, SystemClock
from services.common.files import make_folders
from services.common.sqlite import SqliteConnection, SqliteEngine
from shelora.errors import InvalidConfiguration, SheLoraError, StorageFull, Unavailable

Result = TypeVar("Result")
Connection: TypeAlias = "AsyncConnection | SqliteConnection"
"""What a transaction runs its statements on."""

_ATTEMPTS: Final = 12
_FIRST_WAIT_S: Final = 0.01
_LONGEST_WAIT_S: Final = 1.0
_BUSY_TIMEOUT_MS: Final = 5_000
_POOL_TIMEOUT_S: Final = 60
_MIGRATION_LOCK: Final = 0x5E10_0A01
_DRIVERS: Final = ("sqlite", "postgresql+asyncpg")
# PostgreSQL: serialization failure, deadlock, lock not available.
_CONTENTION_STATES: Final = {"40001", "40P01", "55P03"}
# PostgreSQL: disk full, out of memory, too many connections, being shut down, starting up.
_FULL_STATES: Final = {"53100"}
_BUSY_STATES: Final = {"53200", "53300", "57P01", "57P02", "57P03"}

_logger = structlog.get_logger(__name__)


class Database:
    """A database that is used through named, repeatable transactions.

    SQLite runs in WAL mode with synchronous=FULL and foreign keys, every transaction begins as IMMEDIATE, and one
    connection serves the process; see `SqliteEngine`. PostgreSQL runs SERIALIZABLE.

    Args:
        url: sqlite:///<path> or postgresql+asyncpg://...
        clock: for the waits between tries; None means the machine's clock.
        rng: spreads the waits.
        registry: where to register the metrics shelora_transaction_seconds and shelora_transaction_retries; None for
            none.

    Raises:
        InvalidConfiguration: another kind of database.
    """

    def __init__(
        self,
        url: str,
        *,
        clock: Clock | None = None,
        rng: random.Random | None = None,
        registry: prometheus_client.CollectorRegistry | None = None,
    ) -> None:
        self._engine = _engine(url)
        self._clock = clock or SystemClock()
        self._rng = rng or random.Random()  # noqa: S311 - spreads waits, protects nothing
        self._metrics = None if registry is None else _Metrics(registry)

    async def run_tx(self, name: str, body: Callable[[Connection], Awaitable[Result]]) -> Result:
        """Run a body in one transaction; commit when it returns, roll back when it raises.

        Args:
            name: constant name of the transaction; labels metrics and log lines.
            body: gets the connection. It may be run several times, must have no effect outside the transaction and
                must not begin another one.

        Returns:
            What the body returns in the run that was committed.

        Raises:
            StorageFull: the disk takes no more; nothing was changed.
            Unavailable: the database cannot be reached, or contention outlasted all tries.
            Exception: whatever the body raises.
        """
        started = self._clock.monotonic_s()
        try:
            return await self._retried(name, body)
        finally:
            if self._metrics is not None:
                self._metrics.seconds.labels(name).observe(self._clock.monotonic_s() - started)

    async def _retried(self, name: str, body: Callable[[Connection], Awaitable[Result]]) -> Result:
        wait_s = _FIRST_WAIT_S
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                async with self._engine.begin() as connection:
                    return await body(connection)
            except exc.DBAPIError as error:
                if not _contended(error):
                    documented = _documented(error)
                    if documented is None:
                        raise
                    raise documented from error
                _logger.debug("transaction repeated", transaction=name, attempt=attempt)
            except (exc.TimeoutError, OSError) as error:
                raise Unavailable(
                    f"database: expected a connection, got {type(error).__name__}", hint="check that the database runs"
                ) from error
            if self._metrics is not None:
                self._metrics.retries.labels(name).inc()
            await self._clock.sleep(wait_s * self._rng.uniform(0.5, 1.0))
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
        raise Unavailable(
            f"database: expected transaction {name} to succeed within {_ATTEMPTS} tries, got contention in all of them",
            hint="try again; if it stays, look for another process that holds the database",
            context={"transaction": name},
        )

    @property
    def dialect(self) -> str:
        """Name of the SQL dialect: sqlite or postgresql."""
        return self._engine.dialect.name

    async def close(self) -> None:
        """Close all connections."""
        await self._engine.dispose()


class _Metrics:
    def __init__(self, registry: prometheus_client.CollectorRegistry) -> None:
        self.seconds = prometheus_client.Histogram(
            "shelora_transaction_seconds",
            "Duration of database transactions, retries included.",
            ["name"],
            registry=registry,
        )
        self.retries = prometheus_client.Counter(
            "shelora_transaction_retries", "Repeated database transactions.", ["name"], registry=registry
        )


def _engine(url: str) -> AsyncEngine | SqliteEngine:
    try:
        parsed = sqlalchemy.make_url(url)
    except exc.ArgumentError:
        parsed = sqlalchemy.URL.create("unreadable")
    if parsed.drivername not in _DRIVERS:
        raise InvalidConfiguration(
            f"database URL: expected one that begins with {' or '.join(_DRIVERS)}, got {parsed.drivername}",
            hint="write for example sqlite:////var/lib/shelora/state.db",
        )
    if parsed.get_backend_name() == "postgresql":
        return create_async_engine(
            parsed,
            isolation_level="SERIALIZABLE",
            pool_pre_ping=True,
            pool_timeout=_POOL_TIMEOUT_S,
            hide_parameters=True,
        )
    if parsed.database in {None, "", ":memory:"}:
        raise InvalidConfiguration("database URL: expected the path of an SQLite file, got none")
    make_folders(Path(str(parsed.database)).resolve().parent)
    return SqliteEngine(parsed, _BUSY_TIMEOUT_MS, _POOL_TIMEOUT_S)


def _state(error: exc.DBAPIError) -> str:
    return str(getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None) or "")


def _contended(error: exc.DBAPIError) -> bool:
    message = str(error.orig)
    locked = isinstance(error, exc.OperationalError) and ("is locked" in message or "database is busy" in message)
    return locked or _state(error) in _CONTENTION_STATES


def _documented(error: exc.DBAPIError) -> SheLoraError | None:
    message = str(error.orig)
    if _state(error) in _FULL_STATES or "disk is full" in message:
        return StorageFull(
            "database: expected free space for the write, got a full disk",
            hint="free space on the database's disk; the call may then be repeated as it is",
        )
    if error.connection_invalidated or _state(error) in _BUSY_STATES or isinstance(error, exc.InterfaceError):
        return Unavailable(
            f"database: expected an answer, got {type(error.orig).__name__}", hint="check that the database runs"
        )
    return None


def migrate(url: str, script_location: str | Path) -> None:
    """Bring a database to the newest schema; does nothing when it is there already.

    Safe to call from several processes at once. It runs its own event loop, so call it outside of one or in a worker
    thread.

    Args:
        url: as for Database.
        script_location: the Alembic folder of the service (env.py, versions/); its env.py calls `run_migrations`.

    Raises:
        InvalidConfiguration: another kind of database.
        StorageFull: the disk takes no more.
        Unavailable: the database cannot be reached or another process holds it.
    """
    configuration = alembic.config.Config()
    configuration.set_main_option("script_location", str(script_location).replace("%", "%%"))
    configuration.set_main_option("path_separator", "os")
    configuration.set_main_option("sqlalchemy.url", url.replace("%", "%%"))

    def upgrade(connection: sqlalchemy.Connection) -> None:
        configuration.attributes["connection"] = connection
        alembic.command.upgrade(configuration, "head")

    async def connected() -> None:
        database = Database(url)

        async def body(connection: Connection) -> None:
            if database.dialect == "postgresql":
                # A serializable transaction would go on seeing the schema from before its wait for the lock.
                await connection.execute(text("SET TRANSACTION ISOLATION LEVEL READ COMMITTED"))
                await connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _MIGRATION_LOCK})
            await connection.run_sync(upgrade)

        try:
            await database.run_tx("migrate", body)
        finally:
            await database.close()

    asyncio.run(connected())


def run_migrations(target_metadata: sqlalchemy.MetaData | None = None) -> None:
    """What an Alembic env.py does: run the scripts on the connection that `migrate` opened, in its transaction.

    Args:
        target_metadata: the tables as the code knows them, for comparisons.
    """
    alembic.context.configure(
        connection=alembic.context.config.attributes["connection"],
        target_metadata=target_metadata,
        transactional_ddl=True,
        render_as_batch=True,
    )
    with alembic.context.begin_transaction():
        alembic.context.run_migrations()
