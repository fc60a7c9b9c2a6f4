"""Plots of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

from bench.audit.scenarios import RIGHT_ATTACKERS
from bench.plots import Draw
from bench.records import Record, choose, mean, values

_LINES: Final = (
    ("gradient of A, zeroed", "gradient of A in hand, hidden columns zeroed", "tab:gray", ":"),
    ("gradient of A, dropped", "gradient of A in hand, hidden columns dropped", "tab:red", "-"),
    ("order and start known, dropped", "our wire, order and start known", "tab:orange", "-"),
    ("order unknown", "our wire, order unknown", "tab:blue", "--"),
)


def draws(records: Mapping[str, Sequence[Record]]) -> dict[str, Draw]:
    """What draws each plot of a run, by file name."""
    drawn = {"budgets": _budgets, "batches": _batches, "membership": _membership}
    return {name: partial(draw, records=records[name]) for name, draw in drawn.items()}


def _budgets(axes: Any, records: Sequence[Record]) -> None:
    shares = values(records, "hidden")
    for attacker, label, color, style in _LINES:
        points = []
        for share in shares:
            recall = mean(choose(records, attacker=attacker, hidden=share), "recall_below_threshold")
            if recall is not None:
                points.append((100 * share, 100 * recall))
        axes.plot(*zip(*points, strict=True), style, color=color, label=label, marker=".")
    axes.set_xlabel("encrypted columns, %")
    axes.set_ylabel("tokens recovered, %")
    axes.set_title("One plain gradient step on two texts, rank 64 (the easiest case to attack)")
    axes.legend()


def _batches(axes: Any, records: Sequence[Record]) -> None:
    for attacker, start, marker in (
        ("left factors only", "first", "o"),
        (RIGHT_ATTACKERS[-1], "later", "s"),
        ("order unknown", "later", "x"),
    ):
        found = choose(records, attacker=attacker, start=start)
        for rank, color in zip(
            values(records, "rank"), ("tab:green", "tab:blue", "tab:orange", "tab:red"), strict=True
        ):
            of_rank = choose(found, rank=rank)
            tokens = sorted({(record["texts"], record["tokens"] // record["texts"]) for record in of_rank})
            points = [
                (
                    texts * length,
                    100
                    * (
                        mean(
                            [r for r in of_rank if (r["texts"], r["tokens"] // r["texts"]) == (texts, length)],
                            "leakage",
                        )
                        or 0
                    ),
                )
                for texts, length in tokens
            ]
            axes.plot(
                *zip(*sorted(points), strict=True), color=color, marker=marker, alpha=0.8,
                label=f"{attacker}, {start} round, rank {rank}", linestyle="-" if marker == "o" else "--",
            )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("tokens in the step")
    axes.set_ylabel("tokens recovered beyond chance, %")
    axes.set_title("One plain gradient step, all columns plain")
    axes.legend(fontsize=6)


def _membership(axes: Any, records: Sequence[Record]) -> None:
    for attacker in values(records, "attacker"):
        points = sorted((record["passes"], record["auc"]) for record in choose(records, attacker=attacker))
        axes.plot(*zip(*points, strict=True), "o", label=attacker)
    axes.axhline(0.5, color="black", linewidth=0.8)
    axes.set_xlabel("passes over the agent's texts in the round")
    axes.set_ylabel("AUC of a loss threshold")
    axes.set_title("Does the loss tell that an agent trained on a text?")
    axes.legend()
