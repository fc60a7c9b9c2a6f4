from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from anyio import to_thread

from services.common.database import Database, migrate
from services.keymanager.store import METADATA, MIGRATIONS
from support.keymanager import keymanager_config


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    url = keymanager_config(tmp_path).database_url
    await to_thread.run_sync(migrate, url, MIGRATIONS)
    await to_thread.run_sync(migrate, url, MIGRATIONS)
    found = Database(url)
    yield found
    await found.close()


async def test_the_migrations_make_the_tables_that_the_code_knows(database: Database) -> None:
    def columns(connection: sa.Connection) -> dict[str, list[tuple[str, bool]]]:
        inspector = sa.inspect(connection)
        return {
            name: [(column["name"], bool(column["nullable"])) for column in inspector.get_columns(name)]
            for name in inspector.get_table_names()
            if name != "alembic_version"
        }

    found = await database.run_tx("columns", lambda connection: connection.run_sync(columns))
    expected = {
        table.name: [(column.name, bool(column.nullable)) for column in table.columns]
        for table in METADATA.tables.values()
    }
    assert found == expected


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO epochs VALUES (2, 'current', '{}', x'00', x'00', x'00', 0)",
        "INSERT INTO epochs VALUES (2, 'unheard-of', '{}', x'00', x'00', x'00', 0)",
        "INSERT INTO epochs VALUES (2, 'retired', '{}', x'00', x'00', x'00', 0)",
        "INSERT INTO epochs VALUES (2, 'superseded', '{}', x'00', NULL, x'00', 0)",
        "INSERT INTO revocations VALUES ('spiffe://clinics/agent/one', 7, 0)",
        "INSERT INTO authority VALUES (2, 'clinics', '', x'00')",
        "INSERT INTO audit_head VALUES (2, x'00')",
    ],
)
async def test_the_database_refuses_impossible_states(database: Database, statement: str) -> None:
    first = "INSERT INTO epochs VALUES (1, 'current', '{}', x'00', x'00', x'00', 0)"
    await database.run_tx("first", lambda connection: connection.execute(sa.text(first)))
    with pytest.raises(sa.exc.IntegrityError):
        await database.run_tx("impossible", lambda connection: connection.execute(sa.text(statement)))
