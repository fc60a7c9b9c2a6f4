"""The round state machine: states, events, effects, and the pure `transition` between them."""

from __future__ import annotations

from shelora.rounds.admission import admit_ballot, admit_cipher, admit_factors, registered, running_round
from shelora.rounds.effects import (
    FOLD_TERMS,
    ComputeAverage,
    ComputeBasis,
    Effect,
    FoldResidues,
    RankVotes,
    Record,
    RoundEnded,
    SumSensitivities,
    Work,
    awaits,
    pending,
)
from shelora.rounds.events import (
    AgentLeft,
    AgentRegistered,
    BallotReceived,
    CipherReceived,
    ComputationFailed,
    Computed,
    EpochAdopted,
    Event,
    FactorsReceived,
    Resumed,
    Started,
    Stopped,
    Ticked,
)
from shelora.rounds.federation import Ballot, Federation, Participant, PlanOutline, Rules
from shelora.rounds.machine import transition
from shelora.rounds.phases import AgentTask, FederationState, RoundPhase
from shelora.rounds.round import Member, Round
from shelora.rounds.strategy import JOINT, Computation, Gate, PhaseRule, Strategy, Timer, strategy_named
from shelora.rounds.views import concerned, task_for, vote_columns

__all__ = [
    "FOLD_TERMS",
    "JOINT",
    "AgentLeft",
    "AgentRegistered",
    "AgentTask",
    "Ballot",
    "BallotReceived",
    "CipherReceived",
    "Computation",
    "ComputationFailed",
    "ComputeAverage",
    "ComputeBasis",
    "Computed",
    "Effect",
    "EpochAdopted",
    "Event",
    "FactorsReceived",
    "Federation",
    "FederationState",
    "FoldResidues",
    "Gate",
    "Member",
    "Participant",
    "PhaseRule",
    "PlanOutline",
    "RankVotes",
    "Record",
    "Resumed",
    "Round",
    "RoundEnded",
    "RoundPhase",
    "Rules",
    "Started",
    "Stopped",
    "Strategy",
    "SumSensitivities",
    "Ticked",
    "Timer",
    "Work",
    "admit_ballot",
    "admit_cipher",
    "admit_factors",
    "awaits",
    "concerned",
    "pending",
    "registered",
    "running_round",
    "strategy_named",
    "task_for",
    "transition",
    "vote_columns",
]
