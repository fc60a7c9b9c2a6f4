"""How many agents may be in touch at once and when the others are asked to come back: pace steering.

Every open connection costs the aggregator memory (docs/benchmarks.md). With more agents than places it is the same all
the time: whoever finds no place is told when to ask again, spread so that the questions come at a steady rate.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Final

from services.common.grpc_errors import RETRY_AFTER
from shelora.errors import QuotaExceeded
from shelora.rounds import Rules

CONNECTED_AGENTS: Final = 1_000
"""Places of each kind unless the operator says otherwise."""

STREAMS_PER_AGENT: Final = 16
"""Streams of one kind that an agent may have open; those that a broken network left behind are among them."""

_QUESTIONS_PER_S: Final = 40
"""Agents that come back, each with a new TLS connection, which costs some milliseconds of CPU."""

_SHORTEST_S: Final = 1.0
_LONGEST_S: Final = 300.0
_SHARE_OF_A_PHASE: Final = 0.25


class Places:
    """Agents that have streams of one kind open: as many as there are places.

    Args:
        number: of places.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self._streams: dict[tuple[str, str], int] = {}

    @property
    def taken(self) -> int:
        """Agents that have one."""
        return len(self._streams)

    def taken_by(self, federation: str, agent: str) -> bool:
        """Whether this agent has one."""
        return (federation, agent) in self._streams

    @contextlib.contextmanager
    def take(self, federation: str, agent: str) -> Iterator[bool]:
        """A place as long as the context is open; False when there is none. All streams of an agent share one place.

        Raises:
            QuotaExceeded: the agent has too many streams open.
        """
        key = (federation, agent)
        streams = self._streams.get(key, 0)
        if streams >= STREAMS_PER_AGENT:
            raise QuotaExceeded(
                f"expected at most {STREAMS_PER_AGENT} open streams of one kind from an agent, got one more",
                hint="close streams that nobody reads",
                context={"agent": agent},
            )
        if not streams and self.taken >= self.number:
            yield False
            return
        self._streams[key] = streams + 1
        try:
            yield True
        finally:
            self._streams[key] -= 1
            if not self._streams[key]:
                del self._streams[key]


class Pace:
    """Decides who may stay connected.

    Args:
        connected_agents: agents whose view streams stay open, and as many that send or receive payloads.
        rng: spreads those who come back.

    Attributes:
        views: places of view streams.
        transfers: places of uploads and downloads.
    """

    def __init__(self, connected_agents: int = CONNECTED_AGENTS, rng: random.Random | None = None) -> None:
        self.views = Places(connected_agents)
        self.transfers = Places(connected_agents)
        self._rng = rng or random.Random()  # noqa: S311 - spreads waits, protects nothing

    def come_back_s(self, agents: int, rules: Rules) -> float:
        """When an agent without a place is to ask again, in seconds from now.

        Args:
            agents: registered in its federation; the more of them have no place, the longer.
            rules: of its federation; no phase may be over before the agent has heard of it.
        """
        phase_s = min(rules.negotiate_timeout_ms, rules.train_timeout_ms, rules.cipher_timeout_ms) / 1000
        longest_s = min(_LONGEST_S, _SHARE_OF_A_PHASE * phase_s)
        spread_s = max(_SHORTEST_S, (agents - self.views.number) / _QUESTIONS_PER_S)
        return self._rng.uniform(0.5, 1.5) * min(spread_s, longest_s)

    @contextlib.contextmanager
    def transfer(self, federation: str, agent: str, agents: int, rules: Rules) -> Iterator[None]:
        """A place for an upload or a download.

        Raises:
            QuotaExceeded: there is none now; the error says when to try again.
        """
        with self.transfers.take(federation, agent) as free:
            if not free:
                wait_s = self.come_back_s(agents, rules)
                raise QuotaExceeded(
                    f"expected transfers of at most {self.transfers.number} agents at once, got one more",
                    hint=f"try again in {wait_s:.0f} s",
                    context={RETRY_AFTER: f"{wait_s:.3f}"},
                )
            yield
