"""All SQL of the aggregator. Functions take the connection of a transaction; `Database.run_tx` opens it."""

from __future__ import annotations

from pathlib import Path

from services.aggregator.store import federations, history, payloads, tallies
from services.aggregator.store.rows import StoredFederation, new_federation, rules_of
from services.common.database import Connection

MIGRATIONS = Path(__file__).parent.parent / "migrations"
"""Alembic folder for `services.common.database.migrate`."""

__all__ = [
    "MIGRATIONS",
    "Connection",
    "StoredFederation",
    "federations",
    "history",
    "new_federation",
    "payloads",
    "rules_of",
    "tallies",
]
