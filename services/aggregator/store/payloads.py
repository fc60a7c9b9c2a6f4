"""Accepted uploads and computed results: which bytes stand for what, and which of them nobody needs any more."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import sqlalchemy as sa

from services.aggregator.store import by_key, rows, tables
from services.common.blobs import Blob
from services.common.database import Connection
from shelora.rounds import RoundPhase

_table = tables.payloads


@dataclass(frozen=True)
class PayloadKey:
    """Names a stored payload.

    `kind` is a PayloadKind value for uploads, and one of the result kinds below for results; `agent` is empty where
    the payload belongs to nobody; `round` is 0 for negotiations, `plan_version` 0 for rounds.
    """

    federation: str
    kind: str
    round: int = 0
    plan_version: int = 0
    agent: str = ""


BASIS = "basis"
PROJECTION = "projection"
AVERAGE = "average"
CIPHER_SUM = "cipher-sum"
SENSITIVITY_SUM = "sensitivity-sum"
RANKING = "ranking"

PUBLISHED_KINDS = (AVERAGE, CIPHER_SUM)
"""What late readers of a published round need."""

NEGOTIATED_KINDS = (SENSITIVITY_SUM, RANKING)
"""What late readers of a plan need."""


@dataclass(frozen=True)
class StoredPayload:
    """A payload; `present` tells whether its bytes are still there."""

    key: PayloadKey
    blob: Blob
    present: bool


async def find(connection: Connection, key: PayloadKey) -> StoredPayload | None:
    """The payload of that name, None when it never came."""
    row = (await by_key.select(connection, _table, **_columns(key))).one_or_none()
    return None if row is None else _read(row)


async def record(connection: Connection, key: PayloadKey, blob: Blob, now_ms: int) -> None:
    """Remember that these bytes are the payload of that name, in place of any other."""
    row = {
        **_columns(key),
        "blob_key": blob.key,
        "size_bytes": blob.size_bytes,
        "digest": blob.digest,
        "present": True,
        "at_ms": now_ms,
    }
    await by_key.put(connection, _table, row)


async def of_round(connection: Connection, federation: str, number: int) -> list[StoredPayload]:
    """All payloads of a round, those whose bytes are gone included."""
    return await _select(connection, (_table.c.federation == federation) & (_table.c.round == number))


async def of_plan(connection: Connection, federation: str, version: int) -> list[StoredPayload]:
    """All payloads of the negotiation of a plan version."""
    of_version = (_table.c.federation == federation) & (_table.c.round == 0) & (_table.c.plan_version == version)
    return await _select(connection, of_version)


async def present_keys(connection: Connection) -> set[str]:
    """Blob keys of everything that is there, in all federations."""
    found = await connection.execute(sa.select(_table.c.blob_key).where(_table.c.present))
    return set(found.scalars())


async def forget(connection: Connection, keys: Iterable[PayloadKey]) -> None:
    """Note that these bytes are going away; the rows stay."""
    await by_key.update_each(connection, _table, [_columns(key) for key in keys], {"present": False})


async def unswept_rounds(connection: Connection, federation: str) -> dict[int, RoundPhase]:
    """Ended rounds whose uploads may still be there, and how they ended."""
    ended = (tables.rounds.c.federation == federation) & (tables.rounds.c.ended_at_ms > 0) & ~tables.rounds.c.swept
    query = sa.select(tables.rounds.c.number, tables.rounds.c.phase).where(ended).order_by(tables.rounds.c.number)
    return {row["number"]: RoundPhase(row["phase"]) for row in (await connection.execute(query)).mappings()}


async def unswept_plans(connection: Connection, federation: str, negotiating: int) -> list[int]:
    """Plan versions other than the one being negotiated (0 for none) whose uploads may still be there."""
    table = tables.plans
    over = (table.c.federation == federation) & (table.c.version != negotiating) & ~table.c.swept
    return list((await connection.execute(sa.select(table.c.version).where(over).order_by(table.c.version))).scalars())


async def mark_round_swept(connection: Connection, federation: str, number: int) -> None:
    """Note that a round holds no more bytes than it should."""
    await by_key.update(connection, tables.rounds, {"federation": federation, "number": number}, {"swept": True})


async def mark_plan_swept(connection: Connection, federation: str, version: int) -> None:
    """Note that a plan version holds no more bytes than it should."""
    await by_key.update(connection, tables.plans, {"federation": federation, "version": version}, {"swept": True})


async def outdated(connection: Connection, federation: str, newest_dropped: int) -> list[StoredPayload]:
    """Published payloads of that round and all before it whose bytes are still there."""
    old = (_table.c.federation == federation) & (_table.c.round > 0) & (_table.c.round <= newest_dropped)
    return await _select(connection, old & _table.c.present & _table.c.kind.in_(PUBLISHED_KINDS))


async def _select(connection: Connection, match: sa.ColumnElement[bool]) -> list[StoredPayload]:
    query = sa.select(_table).where(match).order_by(_table.c.kind, _table.c.agent)
    return [_read(row) for row in (await connection.execute(query)).mappings()]


def _columns(key: PayloadKey) -> dict[str, str | int]:
    return {
        "federation": key.federation,
        "round": key.round,
        "plan_version": key.plan_version,
        "kind": key.kind,
        "agent": key.agent,
    }


def _read(row: rows.Row) -> StoredPayload:
    key = PayloadKey(row["federation"], row["kind"], row["round"], row["plan_version"], row["agent"])
    return StoredPayload(key, Blob(row["blob_key"], row["size_bytes"], row["digest"]), row["present"])
