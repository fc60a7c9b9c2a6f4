"""Records as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

Record = dict[str, Any]


def choose(records: Iterable[Record], **wanted: Any) -> list[Record]:
    """Records with these values."""
    return [record for record in records if all(record.get(key) == value for key, value in wanted.items())]


def mean(records: Sequence[Record], key: str) -> float | None:
    """Mean over repeats; None where nothing was measured."""
    values = [float(record[key]) for record in records if key in record]
    return float(np.mean(values)) if values else None


def spread(records: Sequence[Record], key: str) -> str:
    """Smallest to largest over repeats, in percent."""
    values = [float(record[key]) for record in records if key in record]
    if not values:
        return "-"
    low, high = min(values), max(values)
    return percent(low) if round(100 * low) == round(100 * high) else f"{100 * low:.0f} to {100 * high:.0f} %"


def percent(value: float | None) -> str:
    """A share in percent."""
    return "-" if value is None else f"{100 * value + 0.0:.0f} %"


def values(records: Iterable[Record], key: str) -> list[Any]:
    """Distinct values in the order they came."""
    return list(dict.fromkeys(record[key] for record in records if key in record))


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def cross(
    records: Sequence[Record],
    row: Callable[[Record], str],
    columns: Sequence[str],
    key: str,
    head: str,
    cell: Callable[[Sequence[Record], str], str] = spread,
) -> str:
    """One row a setting, one column an attacker.

    Args:
        records: measured.
        row: text of the setting.
        columns: attackers.
        key: the figure.
        head: what rows are.
        cell: figure of the records of a cell.
    """
    settings = list(dict.fromkeys(row(record) for record in records))
    lines = []
    for setting in settings:
        of_setting = [record for record in records if row(record) == setting]
        lines.append([setting, *(cell(choose(of_setting, attacker=name), key) for name in columns)])
    return markdown([head, *columns], lines)
