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


def downgrade(connection: sa.Connection, revision: str) -> None:
    configuration = alembic.config.Config()
    configuration.set_main_option("script_location", str(MIGRATIONS))
    configuration.set_main_option("path_separator", "os")
    configuration.attributes["connection"] = connection
    alembic.command.downgrade(configuration, revision)


async def test_migrations_create_exactly_the_tables_that_the_code_knows(tmp_path):
    path = tmp_path / "state.db"
    await anyio.to_thread.run_sync(migrate, f"sqlite:///{path}", MIGRATIONS)
    await anyio.to_thread.run_sync(migrate, f"sqlite:///{path}", MIGRATIONS)
    engine = sa.create_engine(f"sqlite:///{path}")
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        downgrade(connection, "base")
        assert sa.inspect(connection).get_table_names() == ["alembic_version"]
    engine.dispose()


async def test_federations_from_before_dense_packing_pack_exactly(tmp_path):
    """A database of the first schema, with a federation in it, as an older release left it."""
    url = f"sqlite:///{tmp_path / 'state.db'}"
    await anyio.to_thread.run_sync(migrate, url, MIGRATIONS)
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'state.db'}")
    with engine.begin() as connection:
        downgrade(connection, "0001")
        names = [column["name"] for column in sa.inspect(connection).get_columns("federations")]
        assert "packing" not in names
        columns = [column for column in metadata.tables["federations"].columns if column.name in names]
        row = {
            column.name: "1" if isinstance(column.type, sa.String) else 1 for column in columns if not column.nullable
        }
        table = sa.table("federations", *(sa.column(name) for name in row))
        connection.execute(sa.insert(table).values(row))
    await anyio.to_thread.run_sync(migrate, url, MIGRATIONS)
    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT packing FROM federations")).scalar_one() == "exact"
    engine.dispose()
