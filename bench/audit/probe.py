"""Attackers aimed at one agent: candidates, truth, and one method an attacker."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from bench.audit.attacks import (
    Span,
    distances,
    gradient_span,
    gram_distances,
    join,
    left_distances,
    right_span,
    sketch,
)
from bench.audit.scores import NOTHING, THRESHOLD, Recovery, best, recover
from bench.audit.victim import Victim
from bench.audit.wire import Float32, Float64, Int64, Transmission
from services.client_agent.adapter import AdapterState

DISTRACTORS: Final = 2048
"""Tokens drawn from the rest of the vocabulary beside those that occur."""


@dataclass(frozen=True)
class Finding:
    """What one attacker got.

    Attributes:
        nearest: taking the nearest candidates.
        below: taking only those below the published threshold.
        control: nearest, judged on as many texts that the agent never had, also the best of all attempts.
    """

    nearest: Recovery
    below: Recovery
    control: Recovery

    @property
    def leakage(self) -> float:
        """Recall beyond what the same attack finds of texts that the agent never had; negative by chance."""
        return self.nearest.recall - self.control.recall

    @property
    def error(self) -> float:
        """Standard error of the leakage over texts; 0 where there is only one."""
        return float(np.hypot(self.nearest.error, self.control.error))


MISSED: Final = Finding(NOTHING, NOTHING, NOTHING)


class Probe:
    """Candidates for some texts of a victim, and attacks that use them.

    Args:
        victim: the agent.
        texts: the token sequences it trained on.
        control: as many others.
        generator: of distractors.
        places: the first so many places are attacked.
    """

    def __init__(
        self,
        victim: Victim,
        texts: Sequence[Int64],
        control: Sequence[Int64],
        generator: np.random.Generator,
        places: int = 32,
    ) -> None:
        self.victim = victim
        drawn = generator.choice(victim.vocabulary, min(DISTRACTORS, victim.vocabulary), replace=False)
        vocabulary = np.unique(np.concatenate([*texts, *control, drawn]))
        index = {int(token): position for position, token in enumerate(vocabulary)}
        self._texts = [np.array([index[int(token)] for token in text]) for text in texts]
        self._control = [np.array([index[int(token)] for token in text]) for text in control]
        self._given = {index[token] for token in victim.special if token in index}
        self._opening = self._texts[0][0]
        depth = min(places, max(map(len, texts))) if victim.places else 1
        self.candidates = victim.inputs(vocabulary, depth)

    @property
    def opening(self) -> Float64:
        """First-layer input of the token that opens every text."""
        vector: Float64 = self.candidates[0, self._opening].astype(np.float64)
        return vector

    def judge(self, found: Iterable[Float32]) -> Finding:
        """The best of some attempts."""
        attempts = list(found)
        return Finding(
            best([recover(attempt, self._texts, self._given) for attempt in attempts]),
            best([recover(attempt, self._texts, self._given, THRESHOLD) for attempt in attempts]),
            best([recover(attempt, self._control, self._given) for attempt in attempts]),
        )

    def left(self, sent: Transmission, start: AdapterState | None = None) -> Finding:
        """Left factors only, with the public base model: needs no order, no key, no column of the right factor.

        Args:
            sent: what was sent.
            start: where the agent started, if known.
        """
        query, key = self.victim.projections(start)
        queries, keys = query.apply(self.candidates), key.apply(self.candidates)
        anchored = keys - keys[0, self._opening]
        found = []
        for projection, vectors in ((query, anchored), (key, queries)):
            left = sent.sights[projection.module].left[projection.rows]
            known = None if start is None else start.modules[projection.module].b[projection.rows]
            found += left_distances(left, vectors, self.victim.heads, known)
        return self.judge(found)

    def right(
        self,
        sent: Transmission,
        start: AdapterState | None,
        orders: Sequence[Int64] | None = None,
        *,
        zeroed: bool = False,
        modules: Collection[int] | None = None,
    ) -> Finding:
        """Plain right columns.

        Args:
            sent: what was sent.
            start: where the agent started, if known.
            orders: what the attacker takes for the wire orders; None takes positions for columns.
            zeroed: take hidden columns for zeros.
            modules: attack these instead of all first-layer modules.
        """
        spans = [
            right_span(
                sent.sights[index],
                self._columns(sent, index, orders),
                None if start is None else start.modules[index].a,
                zeroed=zeroed,
            )
            for index in modules or self.victim.first
        ]
        return self._check(spans)

    def sketched(self, sent: Transmission, start: AdapterState, orders: Sequence[Int64]) -> Finding:
        """Plain right columns of a first round, for an attacker who knows the initial A."""
        return self.judge(
            found
            for index in self.victim.first
            for found in distances(
                sketch(self.candidates, start.modules[index].a),
                right_span(sent.sights[index], self._columns(sent, index, orders), None),
                sent.sights[index].rank,
            )
        )

    def gram(
        self,
        sent: Transmission,
        start: AdapterState | None,
        orders: Sequence[Int64],
        modules: Collection[int] | None = None,
    ) -> Finding:
        """Plain right columns and the hidden columns' Gram matrix."""
        return self.judge(
            gram_distances(
                self.candidates,
                sent.sights[index],
                self._columns(sent, index, orders),
                None if start is None else start.modules[index].a,
            )
            for index in modules or self.victim.first
        )

    def gradient(
        self,
        gradients: Sequence[Float64],
        columns: Sequence[Int64],
        *,
        zeroed: bool = False,
        modules: Collection[int] | None = None,
    ) -> Finding:
        """The exact gradient of A: what a server holds that is sent A itself, and more than ours ever holds."""
        spans = [
            gradient_span(gradients[index], columns[index], zeroed=zeroed) for index in modules or self.victim.first
        ]
        return self._check(spans)

    def _check(self, spans: list[Span]) -> Finding:
        """Every module by itself, and all together."""
        tried = spans if len(spans) == 1 else [*spans, join(spans)]
        return self.judge(found for span in tried for found in distances(self.candidates, span))

    def _columns(self, sent: Transmission, index: int, orders: Sequence[Int64] | None) -> Int64:
        sight = sent.sights[index]
        return np.arange(sight.hidden, sight.width) if orders is None else orders[index][sight.hidden :]
