"""Figures of every round on the agent's disk: accuracy, seconds, bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from services.client_agent.state import AgentState

Added = Callable[[Mapping[str, float], Mapping[str, float]], None]
"""Told a round's figures as they were, and those that were added or replaced."""

_UP = ("factors_bytes_up", "cipher_bytes_up")
_DOWN = ("projection_bytes_down", "average_bytes_down", "cipher_bytes_down")
_HE = ("seconds_he_encrypt", "seconds_he_decrypt")

STEPS = (
    "train",
    "factors_upload",
    "encrypt",
    "he_encrypt",
    "cipher_upload",
    "download",
    "apply",
    "he_decrypt",
    "evaluate",
)
"""Steps of a round whose duration is kept as seconds_<step>; encrypt contains he_encrypt, apply he_decrypt."""

SENT = tuple(name.removesuffix("_bytes_up") for name in _UP)
"""Kinds of payloads that an agent sends in a round."""

FETCHED = tuple(name.removesuffix("_bytes_down") for name in _DOWN)
"""Kinds of payloads that an agent fetches in a round."""


class RoundFigures:
    """Collects figures by name; each survives the process as soon as it is added."""

    def __init__(self, state: AgentState, on_added: Added = lambda _before, _figures: None) -> None:
        """Keep them in this state folder, and tell of every figure."""
        self._state = state
        self._on_added = on_added

    def add(self, round_number: int, **figures: float) -> None:
        """Add or replace figures of a round."""
        path = self._state.figures(round_number)
        before = self._state.read_json(path)
        fresh = {name: float(value) for name, value in figures.items()}
        self._state.write_json(path, before | fresh, synced=False)
        self._on_added(before, fresh)

    def get(self, round_number: int) -> dict[str, float]:
        """All figures of a round so far, with totals: bytes_up, bytes_down (payload bytes), he_seconds."""
        found = {name: float(value) for name, value in self._state.read_json(self._state.figures(round_number)).items()}

        def total(names: tuple[str, ...]) -> float:
            return sum(found.get(name, 0.0) for name in names)

        return found | {"bytes_up": total(_UP), "bytes_down": total(_DOWN), "he_seconds": total(_HE)}
