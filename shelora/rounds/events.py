"""What can happen to a federation: decisions of operators and agents, results of workers, and time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from shelora.rounds.effects import Work
from shelora.rounds.federation import Participant


@dataclass(frozen=True)
class Started:
    """An operator starts it, or starts it again; `more_rounds` are added once it has finished."""

    more_rounds: int = 0


@dataclass(frozen=True)
class Stopped:
    """An operator stops it."""

    reason: str


@dataclass(frozen=True)
class EpochAdopted:
    """An operator moves it to another key epoch at the next boundary."""

    epoch: int


@dataclass(frozen=True)
class AgentRegistered:
    """An agent registers, or registers again with other capabilities."""

    participant: Participant


@dataclass(frozen=True)
class BallotReceived:
    """An agent's sensitivities or votes are durable."""

    plan_version: int
    agent: str


@dataclass(frozen=True)
class FactorsReceived:
    """An agent's factors are durable; `examples` stand behind them."""

    round: int
    agent: str
    examples: int


@dataclass(frozen=True)
class CipherReceived:
    """An agent's ciphertext is durable."""

    round: int
    agent: str


@dataclass(frozen=True)
class AgentLeft:
    """An agent gives up the running round."""

    round: int
    agent: str
    reason: str


@dataclass(frozen=True)
class Computed:
    """The result of a computation is durable."""

    work: Work


@dataclass(frozen=True)
class ComputationFailed:
    """A computation can never succeed."""

    work: Work
    reason: str


@dataclass(frozen=True)
class Ticked:
    """Time passed."""


@dataclass(frozen=True)
class Resumed:
    """The aggregator was away; agents get at least `grace_ms` before the running deadline."""

    grace_ms: int


Event: TypeAlias = (
    Started
    | Stopped
    | EpochAdopted
    | AgentRegistered
    | BallotReceived
    | FactorsReceived
    | CipherReceived
    | AgentLeft
    | Computed
    | ComputationFailed
    | Ticked
    | Resumed
)
"""Everything `transition` takes."""
