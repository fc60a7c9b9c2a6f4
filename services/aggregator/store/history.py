"""Events, past rounds, and the figures that agents report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sqlalchemy as sa

from services.aggregator.domain import Event
from services.aggregator.store import by_key, tables
from services.common.database import Connection

UPLOAD = "upload"
REPORT = "report"


async def append_events(connection: Connection, federation: str, events: Sequence[Event]) -> None:
    """Add events; their sequence numbers follow the last one without a gap."""
    if events:
        values = [
            {
                "federation": federation,
                "sequence": event.sequence,
                "at_ms": event.at_ms,
                "kind": event.kind,
                "round": event.round,
                "agent": event.agent,
                "detail": event.detail,
            }
            for event in events
        ]
        await connection.execute(sa.insert(tables.events), values)


async def events_after(connection: Connection, federation: str, after: int, limit: int) -> list[Event]:
    """Events with a greater sequence number, oldest first."""
    table = tables.events
    later = (table.c.federation == federation) & (table.c.sequence > after)
    found = await connection.execute(sa.select(table).where(later).order_by(table.c.sequence).limit(limit))
    return [
        Event(row["sequence"], row["at_ms"], row["kind"], row["round"], row["agent"], row["detail"])
        for row in found.mappings()
    ]


async def put_figures(
    connection: Connection, federation: str, number: int, agent: str, source: str, metrics: Mapping[str, float]
) -> None:
    """Remember an agent's figures of a round, in place of earlier ones from the same source."""
    key = {"federation": federation, "round": number, "agent": agent, "source": source}
    await by_key.put(connection, tables.figures, {**key, "metrics": dict(metrics)})


async def figures_of(connection: Connection, federation: str, number: int) -> dict[str, dict[str, float]]:
    """Figures of a round by agent; reported ones win over those that came with an upload."""
    table = tables.figures
    match = (table.c.federation == federation) & (table.c.round == number)
    merged: dict[str, dict[str, float]] = {}
    # "upload" sorts after "report", so descending order lets reports overwrite.
    for row in (await connection.execute(sa.select(table).where(match).order_by(table.c.source.desc()))).mappings():
        merged.setdefault(row["agent"], {}).update(row["metrics"])
    return merged
