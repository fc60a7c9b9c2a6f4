from __future__ import annotations

import alembic.command
import alembic.config
import anyio.to_thread
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from services.aggregator.store import MIGRATIONS
from services.aggregator.store.tables import metadata
from services.common.database import migrate


async def test_migrations_create_exactly_the_tables_that_the_code_knows(tmp_path):
    path = tmp_path / "state.db"
    await anyio.to_thread.run_sync(migrate, f"sqlite+aiosqlite:///{path}", MIGRATIONS)
    await anyio.to_thread.run_sync(migrate, f"sqlite+aiosqlite:///{path}", MIGRATIONS)
    engine = sa.create_engine(f"sqlite:///{path}")
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        configuration = alembic.config.Config()
        configuration.set_main_option("script_location", str(MIGRATIONS))
        configuration.set_main_option("path_separator", "os")
        configuration.attributes["connection"] = connection
        alembic.command.downgrade(configuration, "base")
        assert sa.inspect(connection).get_table_names() == ["alembic_version"]
    engine.dispose()
