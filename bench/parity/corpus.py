"""Texts: real reviews where the data lie beside the project, else the demonstration's messages; and their splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from bench.sources import ROOT
from services.client_agent.training.data import Row, collect_labels, read_rows
from services.operators.demo.split import split

REAL: Final = ROOT.parent / "shared" / "data" / "rotten_tomatoes"
_DEMO: Final = ROOT / "examples" / "data"


@dataclass(frozen=True)
class Corpus:
    """Labelled texts.

    Attributes:
        name: what they are.
        train, test: the texts.
        labels: all labels.
    """

    name: str
    train: tuple[Row, ...]
    test: tuple[Row, ...]
    labels: tuple[str, ...]


def load_corpus(real: Path = REAL) -> Corpus:
    """The texts that are there."""
    if (real / "train.jsonl").is_file():
        return read_corpus("movie reviews", real / "train.jsonl", real / "test.jsonl")
    return read_corpus("demo messages", _DEMO / "routing_train.jsonl", _DEMO / "routing_test.jsonl")


def read_corpus(name: str, train: Path, test: Path) -> Corpus:
    """Read two files with fields text and label."""
    rows = [tuple(read_rows(str(path), path.name, "", "text", "label")) for path in (train, test)]
    return Corpus(name, rows[0], rows[1], collect_labels(rows[0]))


def shares(labels: Sequence[str], agents: int, concentration: float | None, seed: int) -> list[list[int]]:
    """Rows of every agent: a Dirichlet split by label, or an even one."""
    rng = np.random.default_rng(seed)
    if concentration is not None:
        return split(labels, agents, concentration, rng)
    return [sorted(map(int, part)) for part in np.array_split(rng.permutation(len(labels)), agents)]
