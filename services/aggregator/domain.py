"""What the aggregator talks about: plain values between the wire codec, the service and the store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from services.common.blobs import Blob
from shelora.he.parameters import CkksParameters
from shelora.plan.packing import Packing
from shelora.plan.plan import Negotiation, Plan
from shelora.plan.shapes import ModelShapes
from shelora.rounds import Member
from shelora.rounds.phases import AgentTask, FederationState, RoundPhase


class PayloadKind(str, Enum):
    """Kind of payload; the values name folders and database rows."""

    SENSITIVITY = "sensitivity"
    VOTES = "votes"
    FACTORS = "factors"
    PROJECTION = "projection"
    CIPHER = "cipher"
    AVERAGE = "average"


UPLOAD_KINDS = frozenset({PayloadKind.SENSITIVITY, PayloadKind.VOTES, PayloadKind.FACTORS, PayloadKind.CIPHER})
NEGOTIATION_KINDS = frozenset({PayloadKind.SENSITIVITY, PayloadKind.VOTES})


@dataclass(frozen=True)
class FederationSpec:
    """What the operator decides; bounds are those of the wire contract, checked by `services.aggregator.federations`.

    `negotiation` is ENCRYPTED where the wire leaves it open. `basis_cap` 0 means 4 x the largest registered rank,
    `max_abandoned` 0 means 3, `renegotiate_every` 0 means never.
    """

    federation: str
    rounds: int
    target_agents: int
    quorum: int
    epoch: int
    parameters: CkksParameters
    negotiation: Negotiation = Negotiation.ENCRYPTED
    renegotiate_every: int = 0
    gather_timeout_s: int = 600
    negotiate_timeout_s: int = 600
    train_timeout_s: int = 3600
    cipher_timeout_s: int = 600
    basis_cap: int = 0
    max_abandoned: int = 0
    strategy: str = "joint"
    packing: Packing = Packing.EXACT


@dataclass(frozen=True)
class Signature:
    """What all agents of a federation have in common."""

    shapes: ModelShapes
    base_model_digest: bytes
    tokenizer_digest: bytes
    task: str
    labels_digest: bytes = b""


@dataclass(frozen=True)
class SoftwareVersion:
    """Package version and wire protocol number of a peer."""

    package: str
    protocol: int


@dataclass(frozen=True)
class Registration:
    """What an agent says about itself when it registers; `columns` is k per module."""

    federation: str
    version: SoftwareVersion
    rank: int
    columns: tuple[int, ...]
    budget: str
    signature: Signature
    epoch: int
    parameters_digest: bytes
    examples: int


@dataclass(frozen=True)
class UploadTicket:
    """Names one upload of one agent: the header of the wire's upload stream.

    `round` is 0 for sensitivities and votes; `layout_digest` is empty but for ciphertext; `examples` and `metrics`
    belong to factors.
    """

    federation: str
    kind: PayloadKind
    round: int
    plan_version: int
    epoch: int
    plan_digest: bytes
    size_bytes: int
    digest: bytes
    layout_digest: bytes = b""
    examples: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class UploadStatus:
    """How far an upload is."""

    staged_bytes: int
    complete: bool


@dataclass(frozen=True)
class UploadReceipt:
    """An accepted, durable upload."""

    accepted_bytes: int
    duplicate: bool


@dataclass(frozen=True)
class ExpectedPayload:
    """What an uploaded payload has to be, derived from the plan and the sender's registration.

    Attributes:
        kind: what was announced.
        plan: plan in force (being negotiated, for sensitivities and votes).
        parameters: CKKS parameters of the plan's epoch.
        rank: LoRA rank of the sender (factors).
        columns: per module the encrypted columns of the sender (factors, cipher), or the columns to vote for (votes).
        blocks: exact number of ciphertext blocks (sensitivity, cipher), else 0.
    """

    kind: PayloadKind
    plan: Plan
    parameters: CkksParameters
    rank: int = 0
    columns: tuple[int, ...] = ()
    blocks: int = 0


@dataclass(frozen=True)
class CohortMember:
    """One member of a closed cohort, as the computations need it.

    Attributes:
        agent: name.
        rank: LoRA rank.
        columns: encrypted columns per module.
        weight: share of the cohort's examples, 0 to 1.
        examples: training examples behind the update.
        factors: uploaded factors, None once deleted.
        projection: this member's projection, None before the basis is computed and once deleted.
    """

    agent: str
    rank: int
    columns: tuple[int, ...]
    weight: float
    examples: int
    factors: Blob | None = None
    projection: Blob | None = None


@dataclass(frozen=True)
class BasisResult:
    """The common basis and each member's projection onto it."""

    basis: Blob
    projections: Mapping[str, Blob]


@dataclass(frozen=True)
class DownloadRequest:
    """Names a payload to fetch; `round` is 0 for sensitivities and votes, `plan_version` 0 for the others."""

    federation: str
    kind: PayloadKind
    round: int = 0
    plan_version: int = 0
    offset: int = 0


@dataclass(frozen=True)
class MemberSummary:
    """One agent in one round."""

    agent: str
    rank: int
    columns: tuple[int, ...]
    examples: int
    weight: float = 0.0
    cipher_complete: bool = False
    counted: bool = False
    factors_bytes: int = 0
    cipher_bytes: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    left_reason: str = ""


@dataclass(frozen=True)
class Download:
    """A payload to stream, and the header that goes before it; `blob` is the whole payload.

    `first_plain` says per module from which column on a published average is plain.
    """

    blob: Blob
    offset: int
    plan: Plan
    negotiated_by: int
    layout_digest: bytes = b""
    cohort: tuple[Member, ...] = ()
    weight: float = 0.0
    total_weight: float = 0.0
    first_plain: tuple[int, ...] = ()


@dataclass(frozen=True)
class Terms:
    """What an agent has to know before it registers: the key epoch in force, `basis_cap` and `packing` as specified."""

    epoch: int
    basis_cap: int
    packing: Packing


@dataclass(frozen=True)
class AgentView:
    """All an agent needs to know what to do next; after `come_back_ms`, unless 0, it has to ask again."""

    state: FederationState
    task: AgentTask
    round: int
    phase: RoundPhase | None
    plan: Plan | None
    negotiated_by: int
    deadline_ms: int
    last_published_round: int
    rounds: int
    vote_columns: tuple[int, ...]
    reason: str
    now_ms: int
    come_back_ms: int = 0


@dataclass(frozen=True)
class AgentSummary:
    """A registered agent as operators see it."""

    name: str
    rank: int
    columns: tuple[int, ...]
    budget: str
    version: SoftwareVersion
    last_seen_ms: int
    connected: bool
    task: AgentTask
    examples: int


@dataclass(frozen=True)
class RoundSummary:
    """One round as operators see it; `phase_seconds` by lower-case phase name."""

    number: int
    phase: RoundPhase
    plan_version: int
    members: tuple[MemberSummary, ...]
    deadline_ms: int
    started_at_ms: int
    ended_at_ms: int
    reason: str
    phase_seconds: Mapping[str, float]
    average_bytes: int
    cipher_bytes: int
    total_weight: float


@dataclass(frozen=True)
class FederationSummary:
    """A federation as operators see it."""

    spec: FederationSpec
    state: FederationState
    plan: Plan | None
    negotiated_by: int
    round: RoundSummary | None
    last_published_round: int
    agents: int
    reason: str
    created_at_ms: int
    signature: Signature | None


@dataclass(frozen=True)
class Event:
    """Something that happened in a federation; sequence numbers of one federation have no gaps."""

    sequence: int
    at_ms: int
    kind: str
    round: int = 0
    agent: str = ""
    detail: str = ""
