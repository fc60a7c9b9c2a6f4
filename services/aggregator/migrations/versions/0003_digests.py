"""Payloads are known by their BLAKE3 digest; what was stored under a SHA-256 is of no use any more."""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.alter_column("payloads", "sha256", new_column_name="digest")


def downgrade() -> None:
    op.alter_column("payloads", "digest", new_column_name="sha256")
