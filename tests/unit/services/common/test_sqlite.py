"""What only SQLite does: one file, one writer, locks of other processes."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from pathlib import Path

import prometheus_client
import pytest
import sqlalchemy
from sqlalchemy import text

from services.common.database import _BUSY_TIMEOUT_MS, Connection, Database
from shelora.errors import StorageFull, Unavailable
from support.clock import FakeClock


@pytest.fixture
def file_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/test.db"


async def pragma(database: Database, name: str) -> object:
    async def body(connection: Connection) -> object:
        return (await connection.execute(text(f"PRAGMA {name}"))).scalar()

    return await database.run_tx("pragma", body)


async def test_sqlite_is_durable_and_checks_foreign_keys(file_url: str) -> None:
    database = Database(file_url)
    assert database.dialect == "sqlite"
    assert await pragma(database, "journal_mode") == "wal"
    assert await pragma(database, "synchronous") == 2
    assert await pragma(database, "foreign_keys") == 1
    await database.close()


async def test_a_full_database_refuses_and_recovers(file_url: str) -> None:
    database = Database(file_url)

    async def prepare(connection: Connection) -> None:
        await connection.execute(text("CREATE TABLE entry (name TEXT, number INTEGER)"))

    async def count(connection: Connection) -> object:
        return (await connection.execute(text("SELECT count(*) FROM entry"))).scalar()

    async def fill(connection: Connection) -> None:
        await connection.execute(text("INSERT INTO entry VALUES (:name, 1)"), {"name": "x" * 100_000})

    await database.run_tx("prepare", prepare)
    await pragma(database, "max_page_count = 10")
    with pytest.raises(StorageFull, match="full disk"):
        await database.run_tx("fill", fill)
    assert await database.run_tx("count", count) == 0
    await pragma(database, "max_page_count = 10000")
    await database.run_tx("fill", fill)
    assert await database.run_tx("count", count) == 1
    await database.close()


class Holder:
    """Another process's write lock on an SQLite file, held by a thread with its own connection."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.held = threading.Event()
        self.release = threading.Event()
        self.thread = threading.Thread(target=self._hold)

    def _hold(self) -> None:
        engine = sqlalchemy.create_engine(f"sqlite:///{self.path}")
        with engine.connect() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            self.held.set()
            self.release.wait(60)
            connection.rollback()
        engine.dispose()

    def __enter__(self) -> Holder:
        self.thread.start()
        self.held.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.release.set()
        self.thread.join()


class Releasing(FakeClock):
    """Lets the lock go at the second wait."""

    def __init__(self, holder: Holder | None = None) -> None:
        super().__init__()
        self.holder = holder
        self.waits_s: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.waits_s.append(seconds)
        if self.holder is not None and len(self.waits_s) == 2:
            self.holder.release.set()
            self.holder.thread.join()


async def test_a_locked_database_is_tried_again(tmp_path: Path, file_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.common.database._BUSY_TIMEOUT_MS", 1)
    registry = prometheus_client.CollectorRegistry()
    runs = 0

    async def body(connection: Connection) -> int:
        nonlocal runs
        runs += 1
        return int((await connection.execute(text("SELECT 41 + 1"))).scalar_one())

    with Holder(tmp_path / "test.db") as holder:
        clock = Releasing(holder)
        database = Database(file_url, clock=clock, rng=random.Random(1), registry=registry)
        assert await database.run_tx("answer", body) == 42
        await database.close()
    assert runs == 1
    assert len(clock.waits_s) == 2
    assert 0.005 <= clock.waits_s[0] <= 0.01 <= clock.waits_s[1] <= 0.02
    assert registry.get_sample_value("shelora_transaction_retries_total", {"name": "answer"}) == 2
    assert registry.get_sample_value("shelora_transaction_seconds_count", {"name": "answer"}) == 1


async def test_a_lock_of_another_process_is_waited_for_beside_the_event_loop(tmp_path: Path, file_url: str) -> None:
    async def body(connection: Connection) -> int:
        return int((await connection.execute(text("SELECT 41 + 1"))).scalar_one())

    registry = prometheus_client.CollectorRegistry()
    database = Database(file_url, registry=registry)
    assert await database.run_tx("answer", body) == 42  # from now on transactions begin on the event loop
    with Holder(tmp_path / "test.db") as holder:
        waiting = asyncio.create_task(database.run_tx("answer", body))
        began_s = time.monotonic()
        await asyncio.sleep(0.1)
        assert time.monotonic() - began_s < _BUSY_TIMEOUT_MS / 2000
        assert not waiting.done()
        holder.release.set()
        assert await waiting == 42
    await database.close()
    assert await database.run_tx("answer", body) == 42  # the file is opened again
    await database.close()
    assert not registry.get_sample_value("shelora_transaction_retries_total", {"name": "answer"})


async def test_endless_contention_is_unavailable(
    tmp_path: Path, file_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.common.database._BUSY_TIMEOUT_MS", 1)

    async def body(connection: Connection) -> None:
        raise AssertionError("the lock is held, no body may run")

    with Holder(tmp_path / "test.db"):
        clock = Releasing()
        database = Database(file_url, clock=clock)
        with pytest.raises(Unavailable, match="contention") as caught:
            await database.run_tx("never", body)
        await database.close()
    assert caught.value.context == {"transaction": "never"}
    assert max(clock.waits_s) <= 1.0
