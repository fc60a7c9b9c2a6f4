"""Figures of every round on the agent's disk: accuracy, seconds, bytes."""

from __future__ import annotations

from services.client_agent.state import AgentState

_UP = ("factors_bytes_up", "cipher_bytes_up")
_DOWN = ("projection_bytes_down", "average_bytes_down", "cipher_bytes_down")
_HE = ("seconds_he_encrypt", "seconds_he_decrypt")


class RoundFigures:
    """Collects figures by name; each survives a restart as soon as it is added."""

    def __init__(self, state: AgentState) -> None:
        """Keep them in this state folder."""
        self._state = state

    def add(self, round_number: int, **figures: float) -> None:
        """Add or replace figures of a round."""
        path = self._state.figures(round_number)
        merged = self._state.read_json(path) | {name: float(value) for name, value in figures.items()}
        self._state.write_json(path, merged)

    def get(self, round_number: int) -> dict[str, float]:
        """All figures of a round so far, with totals: bytes_up, bytes_down (payload bytes), he_seconds."""
        found = {name: float(value) for name, value in self._state.read_json(self._state.figures(round_number)).items()}

        def total(names: tuple[str, ...]) -> float:
            return sum(found.get(name, 0.0) for name in names)

        return found | {"bytes_up": total(_UP), "bytes_down": total(_DOWN), "he_seconds": total(_HE)}
