"""What an agent talks about: plain values between its connection, its work and its control interface."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from shelora.plan import ModelShapes, Packing, Plan
from shelora.rounds.phases import AgentTask, FederationState, RoundPhase


class Activity(str, Enum):
    """What the agent is doing."""

    IDLE = "idle"
    PREPARING = "preparing"
    WAITING = "waiting"
    CALIBRATING = "calibrating"
    TRAINING = "training"
    ENCRYPTING = "encrypting"
    TRANSFERRING = "transferring"
    APPLYING = "applying"
    EVALUATING = "evaluating"
    RECONNECTING = "reconnecting"
    ENDED = "ended"


class PayloadKind(str, Enum):
    """Kind of payload; the values name files."""

    SENSITIVITY = "sensitivity"
    VOTES = "votes"
    FACTORS = "factors"
    PROJECTION = "projection"
    CIPHER = "cipher"
    AVERAGE = "average"


@dataclass(frozen=True)
class Signature:
    """What all agents of a federation have in common: trained shapes, base model, tokenizer, task, labels."""

    shapes: ModelShapes
    base_model_digest: bytes
    tokenizer_digest: bytes
    task: str
    labels_digest: bytes = b""


@dataclass(frozen=True)
class Terms:
    """What an agent has to know of a federation before it registers.

    Attributes:
        epoch: key epoch in force.
        basis_cap: cap on basis rows the federation was created with; 0 means 4 x the largest rank.
        packing: how ciphertexts are packed.
    """

    epoch: int
    basis_cap: int
    packing: Packing = Packing.EXACT


@dataclass(frozen=True)
class Registration:
    """What the agent says about itself; `rank` is that of what it sends, `columns` the encrypted k per module."""

    rank: int
    columns: tuple[int, ...]
    budget: str
    signature: Signature
    epoch: int
    parameters_digest: bytes
    examples: int


@dataclass(frozen=True)
class View:
    """The aggregator's word on what to do next."""

    state: FederationState
    task: AgentTask
    round: int
    phase: RoundPhase | None
    plan: Plan | None
    deadline_ms: int
    last_published_round: int
    rounds: int
    vote_columns: tuple[int, ...]
    reason: str
    now_ms: int
    come_back_ms: int = 0

    @property
    def assignment(self) -> tuple[AgentTask, int, int]:
        """Task, round and plan version: while these stay the same, work at hand goes on."""
        return self.task, self.round, self.plan.version if self.plan else 0


@dataclass(frozen=True)
class Member:
    """One member of a round's cohort."""

    agent: str
    rank: int
    counted: bool


@dataclass(frozen=True)
class Upload:
    """A payload on disk that waits to be sent; the same file gives the same bytes after a restart.

    `digest` is that of the file's bytes where whoever wrote them took it on the way; without, the file is read for it.
    """

    kind: PayloadKind
    path: Path
    round: int
    plan: Plan
    layout_digest: bytes = b""
    examples: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    digest: bytes = b""


@dataclass(frozen=True)
class Received:
    """A downloaded and verified payload with the header it came with.

    `first_plain` says per module from which column on a published average is plain.
    """

    path: Path
    size_bytes: int
    plan: Plan
    layout_digest: bytes
    cohort: tuple[Member, ...]
    weight: float
    total_weight: float
    first_plain: tuple[int, ...] = ()


@dataclass(frozen=True)
class Status:
    """The agent at a glance; `sent_rank` is above `rank` where a residual is kept."""

    name: str
    federation: str
    rank: int
    budget: str
    activity: Activity = Activity.IDLE
    fraction: float = 0.0
    detail: str = ""
    round: int = 0
    rounds: int = 0
    applied_round: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    last_error: str = ""
    paused: bool = False
    sent_rank: int = 0
