"""The phases of a round as a value: which phase takes what, for how long, when it ends, and what follows.

The machine reads this table and nothing else; another strategy is another value. `JOINT` is docs/method.md, a round:

    TRAIN -> FACTORS -> BASIS -> CIPHER -> SUM -> PUBLISHED       (any phase may end in ABANDONED)
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from shelora.errors import InvalidPlan
from shelora.rounds.phases import AgentTask, RoundPhase

FINAL_PHASES: Final = frozenset({RoundPhase.PUBLISHED, RoundPhase.ABANDONED})
"""Phases that no round ever leaves."""


class Gate(Enum):
    """What a phase waits for.

    FIRST_FACTORS: the first accepted factors. COHORT: enough factors to close the cohort. COMPUTED: a computation.
    CIPHERTEXTS: a complete ciphertext of every member that has not left.
    """

    FIRST_FACTORS = "first_factors"
    COHORT = "cohort"
    COMPUTED = "computed"
    CIPHERTEXTS = "ciphertexts"


class Timer(Enum):
    """What entering a phase does to the deadline: none at all, kept as it is, or the named wait from now on."""

    NONE = "none"
    KEPT = "kept"
    TRAIN = "train"
    CIPHER = "cipher"


class Computation(str, Enum):
    """What the aggregator computes in a phase."""

    BASIS = "basis"
    AVERAGE = "average"


@dataclass(frozen=True)
class PhaseRule:
    """One row of the table.

    Attributes:
        phase: the phase this row is about.
        then: the phase after it.
        gate: what ends it.
        timer: its deadline.
        task: what agents do in it, WAIT for nothing.
        computation: what the aggregator does in it, if anything; needed exactly for the gate COMPUTED.
    """

    phase: RoundPhase
    then: RoundPhase
    gate: Gate
    timer: Timer
    task: AgentTask = AgentTask.WAIT
    computation: Computation | None = None

    def __post_init__(self) -> None:
        """Check that the gate can ever open."""
        if (self.gate is Gate.COMPUTED) != (self.computation is not None):
            raise InvalidPlan(
                f"expected a computation exactly for the gate {Gate.COMPUTED.value}, got {self.computation} for "
                f"{self.gate.value} in phase {self.phase.value}",
                hint="correct the strategy table",
            )


@dataclass(frozen=True)
class Strategy:
    """The phases of a round in order.

    Attributes:
        name: what a federation's specification calls it.
        rules: one row per phase; each names the next, the last one PUBLISHED.

    Raises:
        InvalidPlan: no rows, a phase twice, a final phase inside, or a row that does not lead to the next one.
    """

    name: str
    rules: tuple[PhaseRule, ...]

    def __post_init__(self) -> None:
        """Check that the rows form one chain that ends in PUBLISHED."""
        chain = [rule.phase for rule in self.rules]
        following = [*chain[1:], RoundPhase.PUBLISHED]
        if not chain or len(set(chain)) != len(chain) or FINAL_PHASES.intersection(chain):
            raise InvalidPlan(
                f"expected each phase of strategy {self.name!r} once and no final one, got "
                f"{[phase.value for phase in chain]}",
                hint="correct the strategy table",
            )
        if [rule.then for rule in self.rules] != following:
            raise InvalidPlan(
                f"expected strategy {self.name!r} to lead through {[phase.value for phase in following]}, got "
                f"{[rule.then.value for rule in self.rules]}",
                hint="correct the strategy table",
            )

    @property
    def first(self) -> RoundPhase:
        """The phase a round opens in."""
        return self.rules[0].phase

    def rule(self, phase: RoundPhase) -> PhaseRule:
        """The row of a phase.

        Raises:
            InvalidPlan: the strategy does not have the phase.
        """
        for rule in self.rules:
            if rule.phase is phase:
                return rule
        raise InvalidPlan(
            f"expected a phase of strategy {self.name!r}, got {phase.value}", hint="a final phase has no row"
        )


JOINT: Final = Strategy(
    "joint",
    (
        PhaseRule(RoundPhase.TRAIN, RoundPhase.FACTORS, Gate.FIRST_FACTORS, Timer.TRAIN, task=AgentTask.FACTORS),
        PhaseRule(RoundPhase.FACTORS, RoundPhase.BASIS, Gate.COHORT, Timer.KEPT, task=AgentTask.FACTORS),
        PhaseRule(RoundPhase.BASIS, RoundPhase.CIPHER, Gate.COMPUTED, Timer.NONE, computation=Computation.BASIS),
        PhaseRule(RoundPhase.CIPHER, RoundPhase.SUM, Gate.CIPHERTEXTS, Timer.CIPHER, task=AgentTask.CIPHER),
        PhaseRule(RoundPhase.SUM, RoundPhase.PUBLISHED, Gate.COMPUTED, Timer.NONE, computation=Computation.AVERAGE),
    ),
)
"""Both factors trained together, column-aware encryption: the only strategy there is."""

STRATEGIES: Final = {JOINT.name: JOINT}
"""Every strategy by name."""


def strategy_named(name: str) -> Strategy:
    """Look a strategy up.

    Args:
        name: as in a federation's specification; empty means joint.

    Raises:
        InvalidPlan: no such strategy.
    """
    try:
        return STRATEGIES[name or JOINT.name]
    except KeyError:
        raise InvalidPlan(
            f"expected a strategy out of {sorted(STRATEGIES)}, got {name!r}", hint="leave it out to get joint"
        ) from None
