"""The published part of a run: the table behind `shelora audit`, and the generated sections of docs/privacy.md."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from bench.audit import report
from bench.audit.scenarios import (
    DEFAULT_BATCH,
    DEFAULT_RANK,
    DEFAULT_STEPS,
    DEFAULT_TEXTS,
    LEFT_ATTACKERS,
    RIGHT_ATTACKERS,
)
from bench.pages import fill
from bench.records import Record, choose, mean, values
from services.common.files import write_atomically
from services.operators.leakage import TABLE

PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "privacy.md"


def publish(result: Mapping[str, Any]) -> list[Path]:
    """Rewrite the table and the generated sections.

    Returns:
        The files written.
    """
    write_atomically(TABLE, (json.dumps(summarize(result), indent=1) + "\n").encode())
    write_atomically(PAGE, fill(PAGE.read_text(encoding="utf-8"), sections(result)).encode())
    return [TABLE, PAGE]


def summarize(result: Mapping[str, Any]) -> dict[str, Any]:
    """What a verdict needs: means over repeats."""
    records = result["records"]
    return {
        "written_by": "python -m bench audit --publish",
        "texts": result["stamp"]["corpus"],
        "single_column_error": max(r["largest_error"] for r in records["budgets"] if "largest_error" in r),
        "budgets": [_budget(records["budgets"], budget) for budget in values(records["budgets"], "budget")],
        "plain_step_left": max(
            r["leakage"] for r in choose(records["batches"], attacker=LEFT_ATTACKERS[0], start="first", texts=1)
        ),
        "trainings": [*_trainings(records["trainings"]), _default(records["defaults"])],
        "orders": {
            "linked": min(r["columns_linked"] for r in records["orders"] if "columns_linked" in r),
            "placed_at_best": max(
                r["columns_placed"] for r in choose(records["orders"], attacker="known opening token")
            ),
        },
        "membership": _membership(records["membership"]),
    }


def sections(result: Mapping[str, Any]) -> dict[str, str]:
    """Generated text by section name."""
    records = result["records"]
    stamp, machine = result["stamp"], result["machine"]
    return {
        "run": (
            f"Last published run: {stamp['texts']:,} {stamp['corpus']}, {sum(result['seconds'].values()):.0f} s on "
            f"{machine['cores']} cores, Python {machine['python']}, torch {machine['torch']}."
        ),
        "budgets": report.budgets(records["budgets"], "recall_below_threshold"),
        "nearest": report.budgets(records["budgets"], "recall"),
        "column": report.single_column(records["budgets"]),
        "first": report.batches(records["batches"], "first", "leakage"),
        "later": report.batches(records["batches"], "later", "leakage"),
        "trainings": report.trainings(records["trainings"], "leakage"),
        "defaults": report.defaults(records["defaults"]),
        "check": report.defaults_below(records["defaults"]),
        "orders": report.orders(records["orders"]),
        "decoders": report.decoders(records["decoders"]),
        "membership": report.membership(records["membership"]),
    }


def _budget(records: Sequence[Record], budget: str) -> dict[str, Any]:
    found = choose(records, budget=budget)
    key = "recall_below_threshold"
    return {
        "hidden": found[0]["hidden"],
        "rank": found[0]["rank"],
        "zeroed": mean(choose(found, attacker="gradient of A, zeroed"), key),
        "dropped": mean(choose(found, attacker="gradient of A, dropped"), key),
        "wire": mean(choose(found, attacker="order and start known, dropped"), key),
        "order_unknown": mean(choose(found, attacker="order unknown"), key),
    }


def _trainings(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row a number of texts: the setting in which left factors leak most."""
    rows = []
    for texts in values(records, "texts"):
        found = choose(records, texts=texts)
        settings = {(r["batch"], r["steps"], r["rank"]) for r in found}
        rows.append(
            max(
                (
                    _training(choose(found, batch=batch, steps=steps, rank=rank), texts, batch, steps, rank)
                    for batch, steps, rank in sorted(settings)
                ),
                key=lambda row: row["left"],
            )
        )
    return rows


def _default(records: Sequence[Record]) -> dict[str, Any]:
    return _training(records, DEFAULT_TEXTS, DEFAULT_BATCH, DEFAULT_STEPS, DEFAULT_RANK)


def _training(records: Sequence[Record], texts: int, batch: int, steps: int, rank: int) -> dict[str, Any]:
    attacks = [found for name in LEFT_ATTACKERS if (found := choose(records, attacker=name))]
    left = max(attacks, key=lambda found: mean(found, "leakage") or 0.0)
    right = [record for record in records if record["attacker"] in RIGHT_ATTACKERS]
    return {
        "texts": texts,
        "batch": batch,
        "steps": steps,
        "rank": rank,
        "left": mean(left, "leakage"),
        "left_error": float(np.sqrt(np.sum(np.square([r["error"] for r in left]))) / len(left)),
        "left_below": mean(left, "recall_below_threshold"),
        "right": max(mean(choose(right, attacker=name), "leakage") or 0.0 for name in RIGHT_ATTACKERS),
    }


def _membership(records: Sequence[Record]) -> list[dict[str, Any]]:
    rows = []
    for own in choose(records, attacker="the agent's own adapter"):
        same = {key: own[key] for key in ("texts", "batch", "steps", "rank", "passes")}
        average = choose(records, attacker="average of two agents", **same)[0]
        rows.append({**same, "own": own["auc"], "average": average["auc"]})
    return rows
