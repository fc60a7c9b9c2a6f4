"""Texts for the audit: real reviews where the data lie beside the project, else the demonstration's messages."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

_ROOT: Final = Path(__file__).resolve().parents[2]
_REAL: Final = _ROOT.parent / "shared" / "data" / "rotten_tomatoes" / "train.jsonl"
_DEMO: Final = _ROOT / "examples" / "data" / "routing_train.jsonl"

Row = dict[str, Any]


@dataclass(frozen=True)
class Corpus:
    """Labelled texts.

    Attributes:
        name: what they are.
        rows: {"text", "label"}, in a fixed shuffled order.
        labels: all labels.
        lengths: tokens of each text.
    """

    name: str
    rows: tuple[Row, ...]
    labels: tuple[str, ...]
    lengths: tuple[int, ...]

    def of_length(self, tokens: int, count: int, skip: int = 0) -> list[Row]:
        """Texts whose length is nearest to a number of tokens, without the first so many."""
        nearest = sorted(range(len(self.rows)), key=lambda index: (abs(self.lengths[index] - tokens), index))
        return [self.rows[index] for index in nearest[skip : skip + count]]

    def sample(self, count: int, skip: int = 0) -> list[Row]:
        """Texts of all lengths."""
        return list(self.rows[skip : skip + count])


def load_corpus(count_tokens: Callable[[list[str]], list[int]]) -> Corpus:
    """The texts that are there, measured by a tokenizer."""
    real = _REAL.is_file()
    path = _REAL if real else _DEMO
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    found = [{"text": str(record["text"]), "label": str(record["label"])} for record in records]
    rows = [found[index] for index in np.random.default_rng(0).permutation(len(found))]
    labels: Sequence[str] = sorted({row["label"] for row in rows})
    lengths = count_tokens([row["text"] for row in rows])
    return Corpus("movie reviews" if real else "demo messages", tuple(rows), tuple(labels), tuple(lengths))
