"""The words of the round protocol: states of a federation, phases of a round, tasks of an agent."""

from __future__ import annotations

from enum import Enum


class FederationState(str, Enum):
    """State of a federation; the values are stored."""

    CREATED = "created"
    GATHERING = "gathering"
    NEGOTIATING = "negotiating"
    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"


class RoundPhase(str, Enum):
    """Phase of a round; the values are stored."""

    TRAIN = "train"
    FACTORS = "factors"
    BASIS = "basis"
    CIPHER = "cipher"
    SUM = "sum"
    PUBLISHED = "published"
    ABANDONED = "abandoned"


class AgentTask(str, Enum):
    """What an agent should do now."""

    WAIT = "wait"
    NEGOTIATE = "negotiate"
    FACTORS = "factors"
    CIPHER = "cipher"
    LEAVE = "leave"
