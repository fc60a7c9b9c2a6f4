"""What every database must do: SQLite, and a real PostgreSQL where it is installed."""

from __future__ import annotations

import asyncio
import contextlib
import random
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
import sqlalchemy
from sqlalchemy import exc, text

from services.common.database import Connection, Database, migrate
from shelora.errors import InvalidConfiguration, Unavailable, WrongPhase


@pytest.fixture
async def database(url: str) -> AsyncIterator[Database]:
    database = Database(url, rng=random.Random(1))

    async def prepare(connection: Connection) -> None:
        await connection.execute(text("DROP TABLE IF EXISTS child"))
        await connection.execute(text("DROP TABLE IF EXISTS entry"))
        await connection.execute(text("CREATE TABLE entry (name VARCHAR(50) PRIMARY KEY, number INTEGER NOT NULL)"))
        await connection.execute(text("CREATE TABLE child (name VARCHAR(50) REFERENCES entry (name))"))

    await database.run_tx("prepare", prepare)
    yield database
    await database.close()


async def put(database: Database, name: str, number: int) -> None:
    async def body(connection: Connection) -> None:
        await connection.execute(text("INSERT INTO entry VALUES (:name, :number)"), {"name": name, "number": number})

    await database.run_tx("put", body)


async def entries(database: Database) -> dict[str, int]:
    async def body(connection: Connection) -> dict[str, int]:
        rows = await connection.execute(text("SELECT name, number FROM entry"))
        return {row.name: row.number for row in rows}

    return await database.run_tx("entries", body)


async def test_a_returned_body_is_committed(database: Database, url: str) -> None:
    await put(database, "a", 1)
    other = Database(url)
    assert await entries(other) == {"a": 1}
    await other.close()


async def test_a_raising_body_is_rolled_back(database: Database) -> None:
    async def body(connection: Connection) -> None:
        await connection.execute(text("INSERT INTO entry VALUES ('a', 1)"))
        raise WrongPhase("expected TRAIN, got CIPHER")

    with pytest.raises(WrongPhase):
        await database.run_tx("body", body)
    assert await entries(database) == {}


async def test_a_cancelled_body_is_rolled_back(database: Database) -> None:
    entered = asyncio.Event()

    async def body(connection: Connection) -> None:
        await connection.execute(text("INSERT INTO entry VALUES ('a', 1)"))
        entered.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(database.run_tx("body", body))
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await entries(database) == {}


async def test_concurrent_increments_all_count(database: Database) -> None:
    await put(database, "counter", 0)

    async def body(connection: Connection) -> None:
        found = await connection.execute(text("SELECT number FROM entry WHERE name = 'counter'"))
        number = found.scalar_one()
        await connection.execute(
            text("UPDATE entry SET number = :number WHERE name = 'counter'"), {"number": number + 1}
        )

    async with anyio.create_task_group() as tasks:
        for _ in range(25):
            tasks.start_soon(database.run_tx, "increment", body)
    assert await entries(database) == {"counter": 25}


async def test_a_long_transaction_lets_others_run(database: Database) -> None:
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    async def body(connection: Connection) -> int:
        before = turns
        for number in range(200):
            row = {"name": str(number), "number": number}
            await connection.execute(text("INSERT INTO entry VALUES (:name, :number)"), row)
        return turns - before

    task = asyncio.create_task(others())
    await asyncio.sleep(0)
    assert await database.run_tx("long", body) >= 6
    task.cancel()


async def test_foreign_keys_and_unique_keys_hold(database: Database) -> None:
    await put(database, "a", 1)
    with pytest.raises(exc.IntegrityError):
        await put(database, "a", 2)

    async def orphan(connection: Connection) -> None:
        await connection.execute(text("INSERT INTO child VALUES ('nobody')"))

    with pytest.raises(exc.IntegrityError):
        await database.run_tx("orphan", orphan)
    assert await entries(database) == {"a": 1}


async def test_errors_show_no_parameters(database: Database) -> None:
    await put(database, "secret-name", 1)
    with pytest.raises(exc.IntegrityError) as caught:
        await put(database, "secret-name", 2)
    assert "secret-name" not in str(caught.value).split("DETAIL")[0]


MIGRATION_ENV = "from services.common.database import run_migrations\n\nrun_migrations()\n"
MIGRATION = """
import sqlalchemy as sa
from alembic import op

revision, down_revision = "{number}", {before}


def upgrade():
    op.create_table("migrated_{number}", sa.Column("name", sa.String(20), primary_key=True))
    {extra}
"""


def scripts(folder: Path, *extras: str) -> Path:
    (folder / "versions").mkdir(parents=True, exist_ok=True)
    (folder / "env.py").write_text(MIGRATION_ENV)
    for number, extra in enumerate(extras, 1):
        before = repr(str(number - 1)) if number > 1 else None
        content = MIGRATION.format(number=number, before=before, extra=extra)
        (folder / "versions" / f"{number}_step.py").write_text(content)
    return folder


async def tables(url: str) -> set[str]:
    database = Database(url)

    async def body(connection: Connection) -> set[str]:
        names = await connection.run_sync(lambda sync: sqlalchemy.inspect(sync).get_table_names())
        return {name for name in names if name.startswith("migrated")}

    try:
        return await database.run_tx("tables", body)
    finally:
        await database.close()


@pytest.fixture
async def empty(url: str) -> str:
    database = Database(url)

    async def body(connection: Connection) -> None:
        for name in ("alembic_version", "migrated_1", "migrated_2"):
            await connection.execute(text(f"DROP TABLE IF EXISTS {name}"))

    await database.run_tx("empty", body)
    await database.close()
    return url


async def test_migrations_are_repeatable_and_continue(empty: str, tmp_path: Path) -> None:
    folder = scripts(tmp_path / "with % sign", "pass")
    for _ in range(2):
        await anyio.to_thread.run_sync(migrate, empty, folder)
        assert await tables(empty) == {"migrated_1"}
    await anyio.to_thread.run_sync(migrate, empty, scripts(folder, "pass", "pass"))
    assert await tables(empty) == {"migrated_1", "migrated_2"}


async def test_a_failing_migration_changes_nothing(empty: str, tmp_path: Path) -> None:
    folder = scripts(tmp_path / "scripts", "pass", "raise ValueError('broken step')")
    with pytest.raises(ValueError, match="broken step"):
        await anyio.to_thread.run_sync(migrate, empty, folder)
    assert await tables(empty) == set()
    await anyio.to_thread.run_sync(migrate, empty, scripts(folder, "pass", "pass"))
    assert await tables(empty) == {"migrated_1", "migrated_2"}


@pytest.mark.slow
async def test_processes_migrate_at_once(empty: str, tmp_path: Path) -> None:
    folder = scripts(tmp_path / "scripts", "pass", "pass")
    # Each imports first, tells so, and waits for the word: the migrations themselves shall meet.
    program = (
        "import sys; from services.common.database import migrate; "
        "print(flush=True); input(); migrate(sys.argv[1], sys.argv[2])"
    )
    command = [sys.executable, "-c", program, empty, str(folder)]

    def all_at_once() -> list[int]:
        processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)]
        with contextlib.ExitStack() as stack:
            streams = [stack.enter_context(process) for process in processes]
            for process in streams:
                assert process.stdout is not None
                assert process.stdout.readline() == b"\n"
            for process in streams:
                assert process.stdin is not None
                process.stdin.write(b"\n")
                process.stdin.flush()
            return [process.wait(timeout=100) for process in streams]

    assert await anyio.to_thread.run_sync(all_at_once) == [0, 0]
    assert await tables(empty) == {"migrated_1", "migrated_2"}


async def test_an_absent_server_is_unavailable() -> None:
    database = Database("postgresql+asyncpg://nobody@127.0.0.1:1/none")

    async def body(connection: Connection) -> None:
        raise AssertionError("there is no connection")

    with pytest.raises(Unavailable, match="check that the database runs"):
        await database.run_tx("none", body)
    await database.close()


@pytest.mark.parametrize(
    "url", ["", "mysql://a/b", "sqlite+aiosqlite:///a.db", "sqlite://", "sqlite:///:memory:", "::"]
)
def test_other_databases_are_refused(url: str) -> None:
    with pytest.raises(InvalidConfiguration, match="database URL"):
        Database(url)
