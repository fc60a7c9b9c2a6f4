"""How a federation packs its ciphertexts; federations from before pack exactly."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("federations", sa.Column("packing", sa.String(length=16), nullable=False, server_default="exact"))


def downgrade() -> None:
    op.drop_column("federations", "packing")
