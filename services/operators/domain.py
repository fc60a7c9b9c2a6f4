"""What operators talk about: plain values between the wire and the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from shelora.he.parameters import CkksParameters
from shelora.plan import ModelShapes, Negotiation, Packing, Plan
from shelora.rounds.phases import AgentTask, FederationState, RoundPhase


@dataclass(frozen=True)
class FederationSpec:
    """What an operator decides about a federation.

    `negotiation` None leaves the choice to the aggregator; `basis_cap` 0 means 4 x the largest registered rank,
    `max_abandoned` 0 means 3, `renegotiate_every` 0 means never.
    """

    federation: str
    rounds: int
    target_agents: int
    quorum: int
    epoch: int
    parameters: CkksParameters
    negotiation: Negotiation | None = None
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
class Member:
    """One agent in one round; `metrics` are the figures it reported."""

    agent: str
    rank: int
    columns: tuple[int, ...]
    examples: int
    weight: float
    cipher_complete: bool
    counted: bool
    factors_bytes: int
    cipher_bytes: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    left_reason: str = ""


@dataclass(frozen=True)
class Round:
    """One round; `phase_seconds` by lower-case phase name.

    Attributes:
        size: number of members.
        complete: members whose ciphertext is complete and checked.
        members: all of them in a list of rounds, none in a federation.
    """

    number: int
    phase: RoundPhase | None
    plan_version: int
    size: int
    complete: int
    members: tuple[Member, ...]
    deadline_ms: int
    started_at_ms: int
    ended_at_ms: int
    reason: str
    phase_seconds: Mapping[str, float]
    average_bytes: int
    cipher_bytes: int
    total_weight: float

    @property
    def counted(self) -> tuple[str, ...]:
        """Names of the members that count in the published average."""
        return tuple(member.agent for member in self.members if member.counted)


@dataclass(frozen=True)
class Federation:
    """A federation as its operators see it; `shapes` is None until an agent has registered."""

    spec: FederationSpec
    state: FederationState
    plan: Plan | None
    round: Round | None
    last_published_round: int
    agents: int
    reason: str
    created_at_ms: int
    shapes: ModelShapes | None
    task: str


@dataclass(frozen=True)
class RegisteredAgent:
    """A registered agent; `columns` is its encrypted k per module."""

    name: str
    rank: int
    columns: tuple[int, ...]
    budget: str
    version: str
    last_seen_ms: int
    connected: bool
    task: AgentTask | None
    examples: int


@dataclass(frozen=True)
class Event:
    """Something that happened in a federation."""

    sequence: int
    at_ms: int
    kind: str
    round: int
    agent: str
    detail: str


@dataclass(frozen=True)
class AgentProgress:
    """What an agent on this machine is doing; `activity` in lower case, `fraction` 0 to 1."""

    name: str
    activity: str
    fraction: float
    detail: str
    round: int
    rounds: int
    applied_round: int
    last_error: str
    metrics: Mapping[str, float] = field(default_factory=dict)
