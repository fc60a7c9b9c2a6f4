"""The state of a federation: everything that the next decision depends on, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from shelora.errors import InvalidPlan
from shelora.plan.plan import Negotiation
from shelora.rounds.phases import FederationState
from shelora.rounds.round import Round
from shelora.rounds.strategy import JOINT, Strategy

MIN_QUORUM = 2
"""A single member's update is never published."""

NEGOTIATION_ATTEMPTS = 3
"""Negotiations without a quorum after which a federation stops."""

DEFAULT_MAX_ABANDONED = 3
"""Abandoned rounds in a row after which a federation stops, unless it says otherwise."""

RANKS_PER_CAP = 4
"""The basis cap is this many times the largest registered rank, unless the federation says otherwise."""


@dataclass(frozen=True)
class Rules:
    """What the operator decided.

    Attributes:
        target_agents: factors that close a cohort at once; registrations that end the gathering at once.
        quorum: fewest agents for a valid average, at least 2.
        gather_timeout_ms: longest wait for registrations.
        negotiate_timeout_ms: longest wait for sensitivities or votes.
        train_timeout_ms: longest wait for factors.
        cipher_timeout_ms: longest wait for ciphertexts.
        negotiation: how agents with a partial budget agree on columns.
        renegotiate_every: published rounds per plan version, 0 for no limit.
        basis_cap: cap on basis rows, 0 for `RANKS_PER_CAP` x the largest registered rank.
        max_abandoned: abandoned rounds in a row after which the federation stops, 0 for `DEFAULT_MAX_ABANDONED`.
        strategy: the phases of a round.

    Raises:
        InvalidPlan: a number out of bounds.
    """

    target_agents: int
    quorum: int
    gather_timeout_ms: int
    negotiate_timeout_ms: int
    train_timeout_ms: int
    cipher_timeout_ms: int
    negotiation: Negotiation = Negotiation.ENCRYPTED
    renegotiate_every: int = 0
    basis_cap: int = 0
    max_abandoned: int = 0
    strategy: Strategy = JOINT

    def __post_init__(self) -> None:
        """Check what the machine relies on."""
        if not MIN_QUORUM <= self.quorum <= self.target_agents:
            raise InvalidPlan(
                f"expected a quorum of {MIN_QUORUM} to target_agents ({self.target_agents}), got {self.quorum}",
                hint="the average of a single agent would be that agent's update",
            )
        timeouts = (
            self.gather_timeout_ms,
            self.negotiate_timeout_ms,
            self.train_timeout_ms,
            self.cipher_timeout_ms,
        )
        if min(timeouts) <= 0:
            raise InvalidPlan(f"expected positive timeouts, got {timeouts} ms", hint="give every phase some time")
        if min(self.renegotiate_every, self.basis_cap, self.max_abandoned) < 0:
            raise InvalidPlan(
                f"expected renegotiate_every, basis_cap and max_abandoned >= 0, got {self.renegotiate_every}, "
                f"{self.basis_cap} and {self.max_abandoned}",
                hint="0 means the default",
            )

    @property
    def abandoned_limit(self) -> int:
        """Abandoned rounds in a row after which the federation stops."""
        return self.max_abandoned or DEFAULT_MAX_ABANDONED


@dataclass(frozen=True)
class Participant:
    """A registered agent.

    Attributes:
        agent: name.
        rank: LoRA rank.
        columns: encrypted columns k per module.
        selective: whether some k lies strictly between 0 and the module's width, so that an order matters.
    """

    agent: str
    rank: int
    columns: tuple[int, ...]
    selective: bool = False


@dataclass(frozen=True)
class PlanOutline:
    """What the machine decides about a plan version; shapes and parameters are added by the service.

    Attributes:
        version: from 1.
        epoch: key epoch.
        cap: cap on basis rows per module.
        levels: per module the distinct encrypted-column counts, ascending.
        negotiation: how the order is agreed; NONE when nobody's budget is partial.
        settled: whether rounds may use it.
        published_before: rounds published before it.
        negotiated_by: agents whose sensitivities or votes were used.
    """

    version: int
    epoch: int
    cap: int
    levels: tuple[tuple[int, ...], ...]
    negotiation: Negotiation
    settled: bool
    published_before: int
    negotiated_by: int = 0


@dataclass(frozen=True)
class Ballot:
    """A negotiation in progress.

    Attributes:
        attempt: from 1.
        invited: agents that were registered when the attempt began.
        received: agents whose sensitivities or votes were accepted.
        contributors: agents whose payloads are used, by name; empty while payloads are taken.
    """

    attempt: int
    invited: frozenset[str]
    received: frozenset[str] = frozenset()
    contributors: tuple[str, ...] = ()

    @property
    def closed(self) -> bool:
        """Whether payloads are no longer taken and the result is computed."""
        return bool(self.contributors)


@dataclass(frozen=True)
class Federation:
    """A federation.

    Attributes:
        name: identifier.
        rules: what the operator decided.
        rounds: rounds to publish in all.
        epoch: key epoch of the plan in force, or of the first plan.
        state: state.
        next_epoch: epoch to move to at the next boundary, 0 for none.
        deadline_ms: end of the gathering or negotiation, 0 for none.
        agents: registered agents by name.
        plan: plan in force or being negotiated.
        ballot: negotiation in progress.
        round: running or last round.
        published: rounds published so far.
        last_published_round: number of the last one, 0 for none.
        abandoned_in_a_row: rounds abandoned since the last published one or the last start.
        reason: why it stopped.
    """

    name: str
    rules: Rules
    rounds: int
    epoch: int
    state: FederationState = FederationState.CREATED
    next_epoch: int = 0
    deadline_ms: int = 0
    agents: Mapping[str, Participant] = field(default_factory=dict)
    plan: PlanOutline | None = None
    ballot: Ballot | None = None
    round: Round | None = None
    published: int = 0
    last_published_round: int = 0
    abandoned_in_a_row: int = 0
    reason: str = ""

    @property
    def ended(self) -> bool:
        """Whether it is finished or stopped."""
        return self.state in {FederationState.FINISHED, FederationState.STOPPED}

    @property
    def negotiation(self) -> tuple[PlanOutline, Ballot] | None:
        """The plan being negotiated and the ballot about it, None when nothing is negotiated."""
        if self.state is not FederationState.NEGOTIATING or self.plan is None or self.ballot is None:
            return None
        return self.plan, self.ballot

    @property
    def live_round(self) -> Round | None:
        """The running round, None between rounds."""
        return self.round if self.round is not None and not self.round.ended else None

    @property
    def next_deadline_ms(self) -> int:
        """When time alone changes something, 0 for never."""
        live = self.live_round
        return live.deadline_ms if live is not None else self.deadline_ms

    @property
    def accepted_epochs(self) -> frozenset[int]:
        """Key epochs whose holders may register."""
        return frozenset({self.epoch, self.next_epoch}) - {0}
