"""Authority, epochs, tokens, members, revocations, and an audit log that takes no change."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_APPEND_ONLY = """
    CREATE TRIGGER audit_no_{lowered} BEFORE {event} ON audit
    BEGIN SELECT RAISE(ABORT, 'the audit log takes no {event}'); END
    """


def upgrade() -> None:
    op.create_table(
        "authority",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("federation", sa.Text, nullable=False),
        sa.Column("certificate_pem", sa.Text, nullable=False),
        sa.Column("sealed_key", sa.LargeBinary, nullable=False),
        sa.CheckConstraint("id = 1", name="one_authority"),
    )
    op.create_table(
        "epochs",
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("parameters", sa.Text, nullable=False),
        sa.Column("public_key", sa.LargeBinary, nullable=False),
        sa.Column("sealed_secret_key", sa.LargeBinary),
        sa.Column("sealed_seed", sa.LargeBinary),
        sa.Column("created_at_ms", sa.BigInteger, nullable=False),
        sa.CheckConstraint("state IN ('current', 'superseded', 'retired')", name="known_state"),
        sa.CheckConstraint(
            "(state = 'retired') = (sealed_secret_key IS NULL) AND (state = 'retired') = (sealed_seed IS NULL)",
            name="secrets_until_retired",
        ),
    )
    op.create_index("one_current_epoch", "epochs", ["state"], unique=True, sqlite_where=sa.text("state = 'current'"))
    op.create_table(
        "tokens",
        sa.Column("digest", sa.LargeBinary, primary_key=True),
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("server_names", sa.Text, nullable=False),
        sa.Column("expires_at_ms", sa.BigInteger, nullable=False),
        sa.Column("key_digest", sa.LargeBinary),
    )
    op.create_table(
        "members",
        sa.Column("identity", sa.Text, primary_key=True),
        sa.Column("server_names", sa.Text, nullable=False),
        sa.Column("not_after_ms", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "revocations",
        sa.Column("identity", sa.Text, primary_key=True),
        sa.Column("epoch", sa.Integer, sa.ForeignKey("epochs.number"), nullable=False),
        sa.Column("at_ms", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "audit",
        sa.Column("sequence", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("at_ms", sa.BigInteger, nullable=False),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("action", sa.Text, nullable=False),
        sa.Column("subject", sa.Text, nullable=False),
        sa.Column("outcome", sa.Text, nullable=False),
        sa.Column("digest", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "audit_head",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("sealed", sa.LargeBinary, nullable=False),
        sa.CheckConstraint("id = 1", name="one_head"),
    )
    for event in ("UPDATE", "DELETE"):
        op.execute(_APPEND_ONLY.format(event=event, lowered=event.lower()))


def downgrade() -> None:
    for table in ("audit_head", "audit", "revocations", "members", "tokens", "epochs", "authority"):
        op.drop_table(table)
