"""Unequal shares of one data set: each agent gets another mixture of labels, as organisations have."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Final

import numpy as np

from shelora.errors import InvalidConfiguration

HELD_OUT: Final = 0.2
"""Part of the data kept for testing when no test file is given."""

LEAST_EXAMPLES: Final = 16
"""Fewest examples of an agent."""

HOME_LABELS: Final = 2
"""Labels of which every agent gets some for certain."""


def hold_out(labels: Sequence[str], share: float, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Split into training and test rows with the same mixture of labels.

    Args:
        labels: one label a row.
        share: part of each label's rows for the test, at least one where a label has two or more.
        rng: draws the rows.

    Returns:
        Indices of training and of test rows, ascending.

    Raises:
        InvalidConfiguration: nothing is left for the test.
    """
    test: list[int] = []
    for rows in _rows_by_label(labels).values():
        count = min(len(rows) - 1, max(1, round(share * len(rows))))
        test += [int(row) for row in rng.permutation(rows)[:count]]
    if not test:
        raise InvalidConfiguration(
            "data: expected at least two rows of some label, so that one can be held out for testing, got one each",
            hint="give more data, or a test file",
        )
    kept = set(range(len(labels))) - set(test)
    return sorted(kept), sorted(test)


def split(labels: Sequence[str], agents: int, concentration: float, rng: np.random.Generator) -> list[list[int]]:
    """Give every row to one agent.

    Each label's rows are cut by proportions from a symmetric Dirichlet distribution. Before that each agent gets some
    rows of two labels of its own, and after it rows move from the largest agents to those below a least size.

    Args:
        labels: one label a row.
        agents: number of agents.
        concentration: of the Dirichlet distribution; 0.1 is very skewed, 100 nearly even.
        rng: draws everything.

    Returns:
        Row indices per agent, ascending; together every row once.

    Raises:
        InvalidConfiguration: too few rows or labels for so many agents.
    """
    by_label = {label: [int(row) for row in rng.permutation(rows)] for label, rows in _rows_by_label(labels).items()}
    least = _least_size(len(labels), agents)
    shares: list[list[int]] = [[] for _ in range(agents)]
    kept = _give_homes(by_label, shares, rng)
    for label in sorted(by_label):
        rows = by_label[label]
        cuts = np.cumsum(rng.dirichlet(np.full(agents, concentration)))[:-1]
        for agent, part in enumerate(np.split(np.array(rows, dtype=int), np.round(cuts * len(rows)).astype(int))):
            shares[agent] += [int(row) for row in part]
    _level(shares, kept, least)
    return [sorted(rows) for rows in shares]


def count_labels(labels: Sequence[str], rows: Sequence[int], order: Sequence[str]) -> list[int]:
    """How often each label of `order` occurs among the rows."""
    counts = Counter(labels[row] for row in rows)
    return [counts[label] for label in order]


def _rows_by_label(labels: Sequence[str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = defaultdict(list)
    for row, label in enumerate(labels):
        found[label].append(row)
    return dict(sorted(found.items()))


def _least_size(rows: int, agents: int) -> int:
    if rows < agents * LEAST_EXAMPLES:
        raise InvalidConfiguration(
            f"data: expected at least {agents * LEAST_EXAMPLES} training rows for {agents} agents, got {rows}",
            hint="give more data or fewer agents",
        )
    return max(LEAST_EXAMPLES, rows // (4 * agents))


def _choose_homes(by_label: dict[str, list[int]], agents: int, rng: np.random.Generator) -> list[list[str]]:
    """Two labels for each agent, those with the most rows for each agent they serve."""
    order = [list(by_label)[index] for index in rng.permutation(len(by_label))]
    guests = dict.fromkeys(order, 0)
    homes = []
    for _ in range(agents):
        home = sorted(order, key=lambda label: (guests[label] + 1) / len(by_label[label]))[:HOME_LABELS]
        for label in home:
            guests[label] += 1
        homes.append(home)
    short = sorted(label for label in order if guests[label] > len(by_label[label]))
    if len(order) < HOME_LABELS or short:
        raise InvalidConfiguration(
            f"data: expected {HOME_LABELS} labels with at least one row for each of {agents} agents, "
            f"got {len(order)} labels" + (f" and too few rows of {', '.join(short)}" if short else ""),
            hint="give more data or fewer agents",
        )
    return homes


def _give_homes(by_label: dict[str, list[int]], shares: list[list[int]], rng: np.random.Generator) -> list[set[int]]:
    """Move some rows of two labels to each agent; returns the rows that have to stay there."""
    homes = _choose_homes(by_label, len(shares), rng)
    guests = Counter(label for home in homes for label in home)
    portions = {
        label: min(max(1, len(by_label[label]) // (2 * count)), LEAST_EXAMPLES // HOME_LABELS)
        for label, count in guests.items()
    }
    kept: list[set[int]] = []
    for rows, home in zip(shares, homes, strict=True):
        mine: set[int] = set()
        for label in home:
            mine.update(by_label[label][: portions[label]])
            del by_label[label][: portions[label]]
        rows += sorted(mine)
        kept.append(mine)
    return kept


def _level(shares: list[list[int]], kept: Sequence[set[int]], least: int) -> None:
    """Move rows from the largest agents to those below the least size."""
    for rows in shares:
        while len(rows) < least:
            donor = max(range(len(shares)), key=lambda agent: len(shares[agent]))
            movable = next(row for row in reversed(shares[donor]) if row not in kept[donor])
            shares[donor].remove(movable)
            rows.append(movable)
