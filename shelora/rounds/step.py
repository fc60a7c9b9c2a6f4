"""One transition in the making: the state so far, the time, and the effects so far. Used inside the machine only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from shelora.errors import CorruptState
from shelora.rounds.effects import Record, RoundEnded
from shelora.rounds.federation import Ballot, Federation, PlanOutline
from shelora.rounds.round import Round

T = TypeVar("T")


class Step:
    """Collects what one event changes; the states it holds are never changed, only replaced."""

    def __init__(self, state: Federation, now_ms: int) -> None:
        """Begin at a state."""
        self.state = state
        self.now_ms = now_ms
        self.effects: list[Record | RoundEnded] = []

    def set(self, **changes: Any) -> None:
        """Replace fields of the federation."""
        self.state = replace(self.state, **changes)

    def set_round(self, **changes: Any) -> None:
        """Replace fields of the running round."""
        self.set(round=replace(self.round, **changes))

    def record(self, kind: str, *, round: int = 0, agent: str = "", detail: str = "") -> None:
        """Add an entry to the history."""
        self.effects.append(Record(kind, round, agent, detail))

    def end_round(self, **changes: Any) -> None:
        """Replace fields of the running round for the last time."""
        ended = replace(self.round, **changes)
        self.set(round=ended)
        self.effects.append(RoundEnded(ended))

    @property
    def round(self) -> Round:
        """The running round.

        Raises:
            CorruptState: there is none.
        """
        return _present(self.state.live_round, "a running round")

    @property
    def negotiation(self) -> tuple[PlanOutline, Ballot]:
        """The negotiation in progress.

        Raises:
            CorruptState: there is none.
        """
        return _present(self.state.negotiation, "a negotiation in progress")


def _present(value: T | None, what: str) -> T:
    if value is None:
        raise CorruptState(f"expected {what}, got none", hint="restore the database from a backup")
    return value
