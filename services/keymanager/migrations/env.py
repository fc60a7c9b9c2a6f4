"""Alembic's entry point."""

from services.common.database import run_migrations
from services.keymanager.store import METADATA

run_migrations(METADATA)
