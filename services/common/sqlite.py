"""An SQLite file in the form of SQLAlchemy's asynchronous engine, as far as transactions need it.

The asynchronous driver hands every statement to a thread and its rows back in several steps, which costs five times as
much as the statements themselves. Here statements run where they are called, in tens of microseconds; only what
waits for the disk or another process has a thread: opening the file, committing changes, beginning while it is locked.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

import anyio
import sqlalchemy
from sqlalchemy import event
from sqlalchemy.pool import StaticPool

from services.common.threads import in_thread

Result = TypeVar("Result")

_IN_A_ROW: Final = 32
"""Statements of one transaction after which others on the event loop have a turn."""


class SqliteConnection:
    """A connection in a transaction, with those methods of an AsyncConnection that stores use."""

    def __init__(self, connection: sqlalchemy.Connection) -> None:
        self._connection = connection
        self._executed = 0

    async def execute(self, statement: sqlalchemy.Executable, parameters: Any = None) -> sqlalchemy.CursorResult[Any]:
        """Run a statement; its rows are to be read before the transaction ends."""
        self._executed += 1
        if self._executed % _IN_A_ROW == 0:
            await asyncio.sleep(0)
        return self._connection.execute(statement, parameters)

    async def scalar(self, statement: sqlalchemy.Executable, parameters: Any = None) -> Any:
        """First column of the first row, None when there is no row."""
        return self._connection.scalar(statement, parameters)

    async def exec_driver_sql(self, statement: str) -> sqlalchemy.CursorResult[Any]:
        """Run a statement as the driver takes it."""
        return self._connection.exec_driver_sql(statement)

    async def run_sync(self, function: Callable[[sqlalchemy.Connection], Result]) -> Result:
        """Call a function with the connection itself."""
        return function(self._connection)


class SqliteEngine:
    """One connection to a file, in WAL mode with synchronous=FULL and foreign keys; transactions take turns.

    Args:
        url: sqlite:///<path>.
        busy_timeout_ms: longest wait for the lock of another process.
        turn_timeout_s: longest wait for the other transactions of this process.
    """

    def __init__(self, url: sqlalchemy.URL, busy_timeout_ms: int, turn_timeout_s: float) -> None:
        self._engine = sqlalchemy.create_engine(
            url, poolclass=StaticPool, connect_args={"check_same_thread": False}, hide_parameters=True
        )
        self._busy_timeout_ms = busy_timeout_ms
        self._turn_timeout_s = turn_timeout_s
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._opened = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sqlite")
        event.listen(self._engine, "connect", self._prepare)
        event.listen(self._engine, "begin", _begin_immediate)

    @property
    def dialect(self) -> sqlalchemy.Dialect:
        """SQLAlchemy's words for this database."""
        return self._engine.dialect

    @contextlib.asynccontextmanager
    async def begin(self) -> AsyncIterator[SqliteConnection]:
        """A transaction: committed at the end of the block, rolled back when it raises.

        Raises:
            TimeoutError: the transactions before it take too long.
            sqlalchemy.exc.DBAPIError: the database refuses.
        """
        await self._take_turn()
        try:
            with contextlib.ExitStack() as stack:

                def begin(busy_timeout_ms: int) -> sqlalchemy.Connection:
                    # Closing rolls back what is not committed.
                    connection = stack.enter_context(self._engine.connect())
                    driver = _driver(connection)
                    driver.execute(f"PRAGMA busy_timeout={busy_timeout_ms}")
                    try:
                        connection.begin()
                    finally:
                        driver.execute(f"PRAGMA busy_timeout={self._busy_timeout_ms}")
                    return connection

                try:
                    connection = begin(0) if self._opened else None
                except sqlalchemy.exc.OperationalError:
                    stack.close()
                    connection = None
                if connection is None:
                    connection = await in_thread(begin, self._busy_timeout_ms, executor=self._thread)
                    self._opened = True
                changes = _driver(connection).total_changes
                yield SqliteConnection(connection)
                if _driver(connection).total_changes == changes:
                    connection.commit()
                else:
                    await in_thread(connection.commit, executor=self._thread)
        finally:
            self._turn.release()

    async def _take_turn(self) -> None:
        if not self._waiting and not self._turn.locked():
            await self._turn.acquire()  # At once.
            return
        self._waiting += 1
        try:
            with anyio.fail_after(self._turn_timeout_s):
                await self._turn.acquire()
        finally:
            self._waiting -= 1

    async def dispose(self) -> None:
        """Close the connection after the transactions before it; later ones open another."""
        async with self._turn:
            self._opened = False
            await in_thread(self._engine.dispose, executor=self._thread)

    def _prepare(self, connection: Any, _record: Any) -> None:
        # The driver's own, partial idea of transactions goes away; _begin_immediate takes its place.
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in (
            f"busy_timeout={self._busy_timeout_ms}",
            "journal_mode=WAL",
            "synchronous=FULL",
            "foreign_keys=ON",
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()


def _begin_immediate(connection: sqlalchemy.Connection) -> None:
    # A transaction that read first and wants to write later would fail at once when another one wrote in between.
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _driver(connection: sqlalchemy.Connection) -> Any:
    """The driver's own connection: it counts changes, and its statements begin no transaction."""
    return connection.connection.driver_connection
