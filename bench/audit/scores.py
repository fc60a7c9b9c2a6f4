"""How much of the private texts an attack brought back."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from bench.audit.wire import Float32, Float64

THRESHOLD: Final = 1e-2
"""Relative distance below which the published check takes a token for found (float32 on the wire leaves about 1e-3)."""

_MISSED: Final = -1


@dataclass(frozen=True)
class Recovery:
    """Shares of 0 to 1 over all texts of a batch.

    Attributes:
        recall: tokens brought back, by place where the model tells places apart.
        rouge1, rouge2: of the texts put together from them.
        error: standard error of the recall over texts; 0 where there is only one.
    """

    recall: float
    rouge1: float
    rouge2: float
    error: float = 0.0


NOTHING: Final = Recovery(0.0, 0.0, 0.0)


def recover(
    found: Float32, texts: Sequence[npt.NDArray[np.int64]], given: Collection[int], threshold: float | None = None
) -> Recovery:
    """Judge an attack that takes, at each place, as many of the nearest candidates as there are texts that long.

    Everything else goes to the attacker for free: it knows the number of texts and their lengths, and which text a
    token it found belongs to. So recall and ROUGE are upper bounds, and blind guessing finds about (texts /
    vocabulary).

    Args:
        found: float32[places, vocabulary], distances; one place stands for a model without places in its inputs.
        texts: tokens as indices into that vocabulary; those beyond the last place are not counted.
        given: indices everybody knows, such as the opening token; not counted.
        threshold: also require distances below this.
    """
    places = found.shape[0]
    picks = [_pick(found[place], _wanted(texts, place, places), threshold) for place in range(places)]
    counts: list[tuple[int, int]] = []
    one, two = [0, 0], [0, 0]
    for text in texts:
        kept = text if places == 1 else text[:places]
        guess = [
            int(token) if token in picks[0 if places == 1 else place] else _MISSED for place, token in enumerate(kept)
        ]
        counted = [place for place, token in enumerate(kept) if int(token) not in given]
        counts.append((sum(guess[place] != _MISSED for place in counted), len(counted)))
        _overlap(one, [kept[place] for place in counted], [guess[place] for place in counted], 1)
        _overlap(two, [kept[place] for place in counted], [guess[place] for place in counted], 2)
    hits, total = (sum(numbers) for numbers in zip(*counts, strict=True))
    if not total:
        return NOTHING
    recall = hits / total
    deviations = sum((hit - recall * count) ** 2 for hit, count in counts)
    error = math.sqrt(deviations) / total if len(counts) > 1 else 0.0
    return Recovery(recall, one[0] / max(one[1], 1), two[0] / max(two[1], 1), error)


def best(recoveries: Sequence[Recovery]) -> Recovery:
    """The most successful one."""
    return max(recoveries, key=lambda recovery: recovery.recall, default=NOTHING)


def area_under_curve(members: Float64, others: Float64) -> float:
    """Chance that a member's score is above another's, ties counting half: 0.5 is blind guessing."""
    ordered = np.sort(others)
    below = np.searchsorted(ordered, members, side="left") + np.searchsorted(ordered, members, side="right")
    return float(below.mean() / (2 * len(others)))


def _wanted(texts: Sequence[npt.NDArray[np.int64]], place: int, places: int) -> int:
    if places == 1:
        return len({int(token) for text in texts for token in text})
    return len({int(text[place]) for text in texts if len(text) > place})


def _pick(row: Float32, count: int, threshold: float | None) -> set[int]:
    """The nearest candidates; equal distances by index, which says nothing about them."""
    nearest = np.argsort(row, kind="stable")[:count]
    return {int(index) for index in nearest if row[index] < (1.0 if threshold is None else threshold)}


def _overlap(sums: list[int], reference: Sequence[int], guess: Sequence[int], size: int) -> None:
    """Add matching and present n-grams; both sides are equally long, so precision, recall and F are one number."""
    wanted = Counter(tuple(map(int, reference[at : at + size])) for at in range(len(reference) - size + 1))
    given = Counter(tuple(map(int, guess[at : at + size])) for at in range(len(guess) - size + 1))
    sums[0] += sum((wanted & given).values())
    sums[1] += sum(wanted.values())
