"""The tables. docs/data-model.md draws them; `migrations` creates them."""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
    }
)


def _federation(*, primary: bool = True) -> sa.Column[str]:
    return sa.Column("federation", sa.String(63), sa.ForeignKey("federations.name"), primary_key=primary)


federations = sa.Table(
    "federations",
    metadata,
    sa.Column("name", sa.String(63), primary_key=True),
    # Compare-and-set: every change of anything below this federation counts it up.
    sa.Column("revision", sa.BigInteger, nullable=False),
    sa.Column("next_sequence", sa.BigInteger, nullable=False),
    sa.Column("created_at_ms", sa.BigInteger, nullable=False),
    # The specification as it was created.
    sa.Column("spec_rounds", sa.Integer, nullable=False),
    sa.Column("spec_epoch", sa.Integer, nullable=False),
    sa.Column("target_agents", sa.Integer, nullable=False),
    sa.Column("quorum", sa.Integer, nullable=False),
    sa.Column("negotiation", sa.String(16), nullable=False),
    sa.Column("renegotiate_every", sa.Integer, nullable=False),
    sa.Column("gather_timeout_s", sa.Integer, nullable=False),
    sa.Column("negotiate_timeout_s", sa.Integer, nullable=False),
    sa.Column("train_timeout_s", sa.Integer, nullable=False),
    sa.Column("cipher_timeout_s", sa.Integer, nullable=False),
    sa.Column("basis_cap", sa.Integer, nullable=False),
    sa.Column("max_abandoned", sa.Integer, nullable=False),
    sa.Column("strategy", sa.String(32), nullable=False),
    sa.Column("packing", sa.String(16), nullable=False, server_default="exact"),
    # The state.
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("deadline_ms", sa.BigInteger, nullable=False),
    sa.Column("rounds", sa.Integer, nullable=False),
    sa.Column("epoch", sa.Integer, nullable=False),
    sa.Column("next_epoch", sa.Integer, nullable=False),
    sa.Column("plan_version", sa.Integer, nullable=False),
    sa.Column("round", sa.Integer, nullable=False),
    sa.Column("published", sa.Integer, nullable=False),
    sa.Column("last_published_round", sa.Integer, nullable=False),
    sa.Column("abandoned_in_a_row", sa.Integer, nullable=False),
    # What all agents have in common; null until one registered.
    sa.Column("shapes", sa.JSON(none_as_null=True)),
    sa.Column("base_model_digest", sa.LargeBinary),
    sa.Column("tokenizer_digest", sa.LargeBinary),
    sa.Column("task", sa.String(64)),
    sa.Column("labels_digest", sa.LargeBinary),
)

epochs = sa.Table(
    "epochs",
    metadata,
    _federation(),
    sa.Column("epoch", sa.Integer, primary_key=True),
    sa.Column("ring_dimension", sa.Integer, nullable=False),
    sa.Column("modulus", sa.BigInteger, nullable=False),
    sa.Column("modulus_bits", sa.Integer, nullable=False),
    sa.Column("scale_bits", sa.Integer, nullable=False),
    sa.Column("security_bits", sa.Integer, nullable=False),
    sa.Column("depth", sa.Integer, nullable=False),
)

agents = sa.Table(
    "agents",
    metadata,
    _federation(),
    sa.Column("agent", sa.String(63), primary_key=True),
    sa.Column("rank", sa.Integer, nullable=False),
    sa.Column("columns", sa.JSON, nullable=False),
    sa.Column("selective", sa.Boolean, nullable=False),
    sa.Column("budget", sa.String(64), nullable=False),
    sa.Column("package_version", sa.String(32), nullable=False),
    sa.Column("protocol", sa.Integer, nullable=False),
    sa.Column("epoch", sa.Integer, nullable=False),
    sa.Column("parameters_digest", sa.LargeBinary, nullable=False),
    sa.Column("examples", sa.BigInteger, nullable=False),
    sa.Column("last_seen_ms", sa.BigInteger, nullable=False),
)

plans = sa.Table(
    "plans",
    metadata,
    _federation(),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("epoch", sa.Integer, nullable=False),
    sa.Column("cap", sa.Integer, nullable=False),
    sa.Column("levels", sa.JSON, nullable=False),
    sa.Column("negotiation", sa.String(16), nullable=False),
    sa.Column("settled", sa.Boolean, nullable=False),
    sa.Column("published_before", sa.Integer, nullable=False),
    sa.Column("negotiated_by", sa.Integer, nullable=False),
    # The latest attempt to negotiate it; 0 for a plan that needed none.
    sa.Column("attempt", sa.Integer, nullable=False),
    # Whether uploads that nobody needs any more are deleted.
    sa.Column("swept", sa.Boolean, nullable=False),
)

ballots = sa.Table(
    "ballots",
    metadata,
    _federation(),
    sa.Column("plan_version", sa.Integer, primary_key=True),
    sa.Column("agent", sa.String(63), primary_key=True),
    sa.Column("invited", sa.Boolean, nullable=False),
    sa.Column("received", sa.Boolean, nullable=False),
    sa.Column("contributes", sa.Boolean, nullable=False),
)

rounds = sa.Table(
    "rounds",
    metadata,
    _federation(),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("phase", sa.String(16), nullable=False),
    sa.Column("plan_version", sa.Integer, nullable=False),
    sa.Column("started_at_ms", sa.BigInteger, nullable=False),
    sa.Column("phase_started_ms", sa.BigInteger, nullable=False),
    sa.Column("deadline_ms", sa.BigInteger, nullable=False),
    sa.Column("ended_at_ms", sa.BigInteger, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("phase_ms", sa.JSON, nullable=False),
    # Whether uploads that nobody needs any more are deleted.
    sa.Column("swept", sa.Boolean, nullable=False),
)

members = sa.Table(
    "members",
    metadata,
    _federation(),
    sa.Column("round", sa.Integer, primary_key=True),
    sa.Column("agent", sa.String(63), primary_key=True),
    sa.Column("rank", sa.Integer, nullable=False),
    sa.Column("columns", sa.JSON, nullable=False),
    sa.Column("examples", sa.BigInteger, nullable=False),
    sa.Column("uploaded", sa.Boolean, nullable=False),
    sa.Column("in_cohort", sa.Boolean, nullable=False),
    sa.Column("complete", sa.Boolean, nullable=False),
    sa.Column("folded", sa.Boolean, nullable=False),
    sa.Column("counted", sa.Boolean, nullable=False),
    sa.Column("left_reason", sa.Text, nullable=False),
)

# Accepted uploads and computed results. A row outlives its bytes: a late resend is still recognised.
payloads = sa.Table(
    "payloads",
    metadata,
    _federation(),
    sa.Column("round", sa.Integer, primary_key=True),
    sa.Column("plan_version", sa.Integer, primary_key=True),
    sa.Column("kind", sa.String(24), primary_key=True),
    sa.Column("agent", sa.String(63), primary_key=True),
    sa.Column("blob_key", sa.String(400), nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("digest", sa.LargeBinary, nullable=False),
    sa.Column("present", sa.Boolean, nullable=False),
    sa.Column("at_ms", sa.BigInteger, nullable=False),
    sa.Index("ix_payloads_present", "federation", "present"),
)

figures = sa.Table(
    "figures",
    metadata,
    _federation(),
    sa.Column("round", sa.Integer, primary_key=True),
    sa.Column("agent", sa.String(63), primary_key=True),
    # "upload" for what came with the factors, "report" for what came after the round.
    sa.Column("source", sa.String(8), primary_key=True),
    sa.Column("metrics", sa.JSON, nullable=False),
)

events = sa.Table(
    "events",
    metadata,
    _federation(),
    sa.Column("sequence", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("at_ms", sa.BigInteger, nullable=False),
    sa.Column("kind", sa.String(64), nullable=False),
    sa.Column("round", sa.Integer, nullable=False),
    sa.Column("agent", sa.String(63), nullable=False),
    sa.Column("detail", sa.Text, nullable=False),
)
