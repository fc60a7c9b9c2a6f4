"""Sums over what is stored, for figures: rounds that are over, bytes that are there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sqlalchemy as sa

from services.aggregator.store import tables
from services.common.database import Connection
from shelora.rounds import RoundPhase


@dataclass(frozen=True)
class EndedRound:
    """A round that was published or abandoned; nothing about it changes any more.

    Attributes:
        number: from 1.
        phase: how it ended.
        reason: why it was abandoned.
        ended_at_ms: when it ended.
        phase_ms: milliseconds spent in its phases.
        counted: members that the published average contains.
        left_out: members whose factors came, but whom the average does not contain.
        payload_bytes: bytes of its payloads by kind, also of those that are deleted by now.
    """

    number: int
    phase: RoundPhase
    reason: str
    ended_at_ms: int
    phase_ms: Mapping[RoundPhase, int]
    counted: int
    left_out: int
    payload_bytes: Mapping[str, int]


async def ended_rounds(connection: Connection, federation: str, after: int) -> list[EndedRound]:
    """Rounds with a greater number that are over, oldest first."""
    table = tables.rounds
    over = (table.c.federation == federation) & (table.c.number > after) & (table.c.ended_at_ms > 0)
    found = list((await connection.execute(sa.select(table).where(over).order_by(table.c.number))).mappings())
    if not found:
        return []
    members = await _members(connection, federation, after)
    sizes = await _sizes(connection, federation, after)
    ended = []
    for row in found:
        counted, uploaded = members.get(row["number"], (0, 0))
        ended.append(
            EndedRound(
                number=row["number"],
                phase=RoundPhase(row["phase"]),
                reason=row["reason"],
                ended_at_ms=row["ended_at_ms"],
                phase_ms={RoundPhase(phase): int(spent) for phase, spent in row["phase_ms"].items()},
                counted=counted,
                left_out=uploaded - counted,
                payload_bytes=sizes.get(row["number"], {}),
            )
        )
    return ended


async def present_bytes(connection: Connection, federation: str) -> dict[str, int]:
    """Bytes of the payloads that are in the blob store now, by kind."""
    table = tables.payloads
    there = (table.c.federation == federation) & table.c.present
    query = sa.select(table.c.kind, sa.func.sum(table.c.size_bytes).label("bytes")).where(there).group_by(table.c.kind)
    return {row["kind"]: int(row["bytes"]) for row in (await connection.execute(query)).mappings()}


async def _members(connection: Connection, federation: str, after: int) -> dict[int, tuple[int, int]]:
    """Counted members and members with factors, by round."""
    table = tables.members
    sums = [sa.func.sum(sa.case((table.c[name], 1), else_=0)).label(name) for name in ("counted", "uploaded")]
    later = (table.c.federation == federation) & (table.c.round > after)
    query = sa.select(table.c.round, *sums).where(later).group_by(table.c.round)
    return {
        row["round"]: (int(row["counted"]), int(row["uploaded"]))
        for row in (await connection.execute(query)).mappings()
    }


async def _sizes(connection: Connection, federation: str, after: int) -> dict[int, dict[str, int]]:
    """Payload bytes by round and kind."""
    table = tables.payloads
    keys, total = (table.c.round, table.c.kind), sa.func.sum(table.c.size_bytes).label("bytes")
    later = (table.c.federation == federation) & (table.c.round > after)
    found: dict[int, dict[str, int]] = {}
    for row in (await connection.execute(sa.select(*keys, total).where(later).group_by(*keys))).mappings():
        found.setdefault(row["round"], {})[row["kind"]] = int(row["bytes"])
    return found
