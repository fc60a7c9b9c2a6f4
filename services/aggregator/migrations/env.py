"""Alembic runs this; `services.common.database.migrate` opened the connection."""

from __future__ import annotations

from services.aggregator.store.tables import metadata
from services.common.database import run_migrations

run_migrations(metadata)
