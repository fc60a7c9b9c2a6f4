"""Rows by the values of some columns, on every database."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import pytest
import sqlalchemy as sa
from sqlalchemy import exc

from services.aggregator.store import by_key
from services.common.database import Connection, Database

PARCELS = sa.Table(
    "parcels",
    sa.MetaData(),
    sa.Column("depot", sa.String(20), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("label", sa.LargeBinary),
    sa.Column("contents", sa.JSON, nullable=False),
    sa.Column("sent", sa.Boolean, nullable=False),
)
FIRST = {"depot": "north", "number": 1, "label": b"\x00\xff", "contents": {"cups": 2}, "sent": False}
SECOND = {**FIRST, "number": 2, "label": None, "contents": []}
ELSEWHERE = {**FIRST, "depot": "south"}


class UndoneError(Exception):
    """Ends a transaction without a trace."""


@pytest.fixture
async def connection(url: str) -> AsyncIterator[Connection]:
    database = Database(url)
    with contextlib.suppress(UndoneError):
        async with database._engine.begin() as opened:
            await opened.run_sync(PARCELS.metadata.drop_all)
            await opened.run_sync(PARCELS.metadata.create_all)
            for row in (FIRST, SECOND, ELSEWHERE):
                await by_key.insert(opened, PARCELS, row)
            yield opened
            raise UndoneError
    await database.close()


async def rows(connection, **equal):
    found = [dict(row) for row in await by_key.select(connection, PARCELS, **equal)]
    return sorted(found, key=lambda row: (row["depot"], row["number"]))


async def test_rows_are_found_by_any_columns(connection):
    assert await rows(connection, depot="north", number=1) == [FIRST]
    assert await rows(connection, depot="north") == [FIRST, SECOND]
    assert await rows(connection, number=1) == [FIRST, ELSEWHERE]
    assert await rows(connection, depot="west") == []


async def test_all_rows_that_match_are_changed_and_counted(connection):
    assert await by_key.update(connection, PARCELS, {"depot": "north"}, {"sent": True, "contents": {"cups": 3}}) == 2
    assert await by_key.update(connection, PARCELS, {"depot": "north", "sent": False}, {"label": b""}) == 0
    changed = {"sent": True, "contents": {"cups": 3}}
    assert await rows(connection) == [{**FIRST, **changed}, {**SECOND, **changed}, ELSEWHERE]


async def test_a_column_may_be_both_matched_and_changed(connection):
    assert await by_key.update(connection, PARCELS, {"depot": "north", "number": 2}, {"number": 3}) == 1
    assert await rows(connection) == [FIRST, {**SECOND, "number": 3}, ELSEWHERE]


async def test_putting_adds_or_replaces(connection):
    third, replaced = {**SECOND, "number": 3}, {**FIRST, "label": b"new", "contents": None, "sent": True}
    await by_key.put(connection, PARCELS, third)
    await by_key.put(connection, PARCELS, replaced)
    assert await rows(connection) == [replaced, SECOND, third, ELSEWHERE]


async def test_putting_a_part_leaves_the_other_columns(connection):
    await by_key.put(connection, PARCELS, {key: FIRST[key] for key in ("depot", "number", "contents")} | {"sent": True})
    assert await rows(connection, depot="north", number=1) == [{**FIRST, "sent": True}]


async def test_an_inserted_key_must_be_new(connection):
    with pytest.raises(exc.IntegrityError):
        await by_key.insert(connection, PARCELS, FIRST)
