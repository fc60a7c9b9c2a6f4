"""Federations, key epochs, agents, plans, ballots, rounds, members, payloads, figures, events."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_TABLES = (
    "events",
    "figures",
    "payloads",
    "members",
    "rounds",
    "ballots",
    "plans",
    "agents",
    "epochs",
    "federations",
)


def upgrade() -> None:
    op.create_table(
        "federations",
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.Column("next_sequence", sa.BigInteger(), nullable=False),
        sa.Column("created_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("spec_rounds", sa.Integer(), nullable=False),
        sa.Column("spec_epoch", sa.Integer(), nullable=False),
        sa.Column("target_agents", sa.Integer(), nullable=False),
        sa.Column("quorum", sa.Integer(), nullable=False),
        sa.Column("negotiation", sa.String(length=16), nullable=False),
        sa.Column("renegotiate_every", sa.Integer(), nullable=False),
        sa.Column("gather_timeout_s", sa.Integer(), nullable=False),
        sa.Column("negotiate_timeout_s", sa.Integer(), nullable=False),
        sa.Column("train_timeout_s", sa.Integer(), nullable=False),
        sa.Column("cipher_timeout_s", sa.Integer(), nullable=False),
        sa.Column("basis_cap", sa.Integer(), nullable=False),
        sa.Column("max_abandoned", sa.Integer(), nullable=False),
        sa.Column("strategy", sa.String(length=32), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("deadline_ms", sa.BigInteger(), nullable=False),
        sa.Column("rounds", sa.Integer(), nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("next_epoch", sa.Integer(), nullable=False),
        sa.Column("plan_version", sa.Integer(), nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("published", sa.Integer(), nullable=False),
        sa.Column("last_published_round", sa.Integer(), nullable=False),
        sa.Column("abandoned_in_a_row", sa.Integer(), nullable=False),
        sa.Column("shapes", sa.JSON(), nullable=True),
        sa.Column("base_model_digest", sa.LargeBinary(), nullable=True),
        sa.Column("tokenizer_digest", sa.LargeBinary(), nullable=True),
        sa.Column("task", sa.String(length=64), nullable=True),
        sa.Column("labels_digest", sa.LargeBinary(), nullable=True),
        sa.PrimaryKeyConstraint("name", name="pk_federations"),
    )
    op.create_table(
        "agents",
        sa.Column("federation", sa.String(length=63), nullable=False),
        sa.Column("agent", sa.String(length=63), nullable=False),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.Column("columns", sa.JSON(), nullable=False),
        sa.Column("selective", sa.Boolean(), nullable=False),
        sa.Column("budget", sa.String(length=64), nullable=False),
        sa.Column("package_version", sa.String(length=32), nullable=False),
        sa.Column("protocol", sa.Integer(), nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("parameters_digest", sa.LargeBinary(), nullable=False),
        sa.Column("examples", sa.BigInteger(), nullable=False),
        sa.Column("last_seen_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["federation"], ["federations.name"], name="fk_agents_federation"),
        sa.PrimaryKeyConstraint("federation", "agent", name="pk_agents"),
    )
    op.create_table(
        "ballots",
        sa.Column("federation", sa.String(length=63), nullable=False),
        sa.Column("plan_version", sa.Integer(), nullable=False),
        sa.Column("agent", sa.String(length=63), nullable=False),
        sa.Column("invited", sa.Boolean(), nullable=False),
        sa.Column("received", sa.Boolean(), nullable=False),
        sa.Column("contributes", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["federation"], ["federations.name"], name="fk_ballots_federation"),
        sa.PrimaryKeyConstraint("federation", "plan_version", "agent", name="pk_ballots"),
    )
    op.create_table(
        "epochs",
        sa.Column("federation", sa.String(length=63), nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("ring_dimension", sa.Integer(), nullable=False),
        sa.Column("modulus", sa.BigInteger(), nullable=False),
        sa.Column("modulus_bits", sa.Integer(), nullable=False),
        sa.Column("scale_bits", sa.Integer(), nullable=False),
        sa.Column("security_bits", sa.Integer(), nullable=False),
        sa.Column("depth", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["federation"], ["federations.name"], name="fk_epochs_federation"),
        sa.PrimaryKeyConstraint("federation", "epoch", name="pk_epochs"),
    )
    op.create_table(
        "events",
        sa.Column("federation", sa.String(length=63), nullable=False),
        sa.Column("sequence", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("at_ms", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.String(length=64), nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("agent", sa.String(length=63), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["federation"], ["federations.name"], name="fk_events_federation"),
        sa.PrimaryKeyConstraint("federation", "sequence", name="pk_events"),
    )
    op.create_table(
        "figures",
        sa.Column("federation", sa.String(length=63), nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("agent", sa.String(length=63), nullable=False),
        sa.Column("source", sa.String(length=8), nullable=False),
        sa.Column("metrics", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["federation"], ["federations.name"], name="fk_figures_federation"),
        sa.PrimaryKeyConstraint("federation", "round", "agent", "source", name="pk_figures"),
    )
    op.create_table(
        "members",
        sa.Column("federation", sa.String(length=63), nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("agent", sa.String(length=63), nullable=False),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.Column("columns", sa.JSON(), nullable=False),
        sa.Column("examples", sa.BigInteger(), nullable=False),
        sa.Column("uploaded", sa.Boolean(), nullable=False),
        sa.Column("in_cohort", sa.Boolean(), nullable=False),
        sa.Column("complete", sa.Boolean(), nullable=False),
        sa.Column("folded", sa.Boolean(), nullable=False),
        sa.Column("counted", sa.Boolean(), nullable=False),
        sa.Column("left_reason", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["federation"], ["federations.name"], name="fk_members_federation"),
        sa.PrimaryKeyConstraint("federation", "round", "agent", name="pk_members"),
    )
    op.create_table(
        "payloads",
        sa.Column("federation", sa.String(length=63), nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("plan_version", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(length=24), nullable=False),
        sa.Column("agent", sa.String(length=63), nullable=False),
        sa.Column("blob_key", sa.String(length=400), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.LargeBinary(), nullable=False),
        sa.Column("present", sa.Boolean(), nullable=False),
        sa.Column("at_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["federation"], ["federations.name"], name="fk_payloads_federation"),
        sa.PrimaryKeyConstraint("federation", "round", "plan_version", "kind", "agent", name="pk_payloads"),
    )
    op.create_index("ix_payloads_present", "payloads", ["federation", "present"], unique=False)
    op.create_table(
        "plans",
        sa.Column("federation", sa.String(length=63), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("cap", sa.Integer(), nullable=False),
        sa.Column("levels", sa.JSON(), nullable=False),
        sa.Column("negotiation", sa.String(length=16), nullable=False),
        sa.Column("settled", sa.Boolean(), nullable=False),
        sa.Column("published_before", sa.Integer(), nullable=False),
        sa.Column("negotiated_by", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("swept", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["federation"], ["federations.name"], name="fk_plans_federation"),
        sa.PrimaryKeyConstraint("federation", "version", name="pk_plans"),
    )
    op.create_table(
        "rounds",
        sa.Column("federation", sa.String(length=63), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("phase", sa.String(length=16), nullable=False),
        sa.Column("plan_version", sa.Integer(), nullable=False),
        sa.Column("started_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("phase_started_ms", sa.BigInteger(), nullable=False),
        sa.Column("deadline_ms", sa.BigInteger(), nullable=False),
        sa.Column("ended_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("phase_ms", sa.JSON(), nullable=False),
        sa.Column("swept", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["federation"], ["federations.name"], name="fk_rounds_federation"),
        sa.PrimaryKeyConstraint("federation", "number", name="pk_rounds"),
    )


def downgrade() -> None:
    for table in _TABLES:
        op.drop_table(table)
