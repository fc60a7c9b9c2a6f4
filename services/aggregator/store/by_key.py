"""Rows by the values of some columns.

Building a statement costs more than running it on SQLite, so each is built once and then only filled in.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import sqlite

from services.common.database import Connection

_NAMED: Final = sqlite.dialect(paramstyle="named")
_IN_ONE_GO: Final = 250


async def select(connection: Connection, table: sa.Table, **equal: Any) -> sa.MappingResult:
    """All rows whose columns have these values."""
    return (await connection.execute(_select(table, tuple(equal)), _bound(equal))).mappings()


async def insert(connection: Connection, table: sa.Table, row: Mapping[str, Any]) -> None:
    """Add a row whose key is new."""
    await connection.execute(_insert(table), dict(row))


async def update(connection: Connection, table: sa.Table, equal: Mapping[str, Any], values: Mapping[str, Any]) -> int:
    """Change all rows whose columns have these values; answers how many."""
    changed = await connection.execute(_update(table, tuple(equal)), {**_bound(equal), **values})
    return int(changed.rowcount)


async def update_each(
    connection: Connection, table: sa.Table, rows: Sequence[Mapping[str, Any]], values: Mapping[str, Any]
) -> None:
    """Change the rows of each of these keys alike; a few hundred in one go."""
    for start in range(0, len(rows), _IN_ONE_GO):
        part = rows[start : start + _IN_ONE_GO]
        await connection.execute(_update(table, tuple(part[0])), [{**_bound(equal), **values} for equal in part])


async def put(connection: Connection, table: sa.Table, row: Mapping[str, Any]) -> None:
    """Add a row, or replace the other columns of the one with its primary key."""
    await connection.execute(_upsert(table, tuple(row)), dict(row))


def _bound(equal: Mapping[str, Any]) -> dict[str, Any]:
    return {f"of_{column}": value for column, value in equal.items()}


def _match(table: sa.Table, columns: tuple[str, ...]) -> sa.ColumnElement[bool]:
    return sa.and_(sa.true(), *(table.c[column] == sa.bindparam(f"of_{column}") for column in columns))


@functools.cache
def _select(table: sa.Table, columns: tuple[str, ...]) -> sa.Select[Any]:
    return sa.select(table).where(_match(table, columns))


@functools.cache
def _insert(table: sa.Table) -> sa.Insert:
    return sa.insert(table)


@functools.cache
def _update(table: sa.Table, columns: tuple[str, ...]) -> sa.Update:
    return sa.update(table).where(_match(table, columns))


@functools.cache
def _upsert(table: sa.Table, columns: tuple[str, ...]) -> sa.TextClause:
    """As text, which is the same for SQLite and PostgreSQL: an upsert as an expression is rendered at every call."""
    key = [column.name for column in table.primary_key]
    added = sqlite.insert(table).values({column: sa.bindparam(column) for column in columns})
    replaced = {column: added.excluded[column] for column in columns if column not in key}
    upsert = added.on_conflict_do_update(index_elements=key, set_=replaced)
    values = (sa.bindparam(column, type_=table.c[column].type) for column in columns)
    return sa.text(str(upsert.compile(dialect=_NAMED))).bindparams(*values)
