"""Curves of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, Final

from bench.parity.scenarios import CENTRALISED, METHODS, UNTRUNCATED
from bench.plots import Draw
from bench.records import Record, choose, mean, values

_STYLES: Final = {
    "FedIT": ("tab:gray", ":"),
    "HetLoRA": ("tab:brown", ":"),
    "FlexLoRA": ("tab:green", "--"),
    "FLoRA": ("tab:purple", "--"),
    "ours, exact": ("tab:blue", "-"),
    "ours, capped basis": ("tab:cyan", "-."),
    "ours, dense packing": ("tab:olive", "-."),
    "ours, residual kept": ("tab:red", "-"),
}


def draws(records: Mapping[str, Sequence[Record]]) -> dict[str, Draw]:
    """What draws each plot of the main study, by file name."""
    found = list(chain.from_iterable(records.values()))
    splits = values(found, "split")
    drawn: dict[str, Draw] = {}
    for split in splits:
        drawn[f"accuracy-{split}"] = partial(_accuracy, records=found, split=split)
        drawn[f"ranks-{split}"] = partial(_ranks, records=found, split=split, title=f"{split} split")
    return drawn


def routing_draws(records: Mapping[str, Sequence[Record]]) -> dict[str, Draw]:
    """The same for the study with more classes."""
    found = list(chain.from_iterable(records.values()))
    (split,) = values(found, "split")
    return {"ranks-routing": partial(_ranks, records=found, split=split, title=f"routing messages, {split} split")}


def _accuracy(axes: Any, records: Sequence[Record], split: str) -> None:
    """Accuracy by round, mean over agents and seeds."""
    for kind in METHODS.values():
        _line(axes, choose(records, method=kind.name, split=split), kind.name, *_STYLES[kind.name])
    _line(axes, choose(records, method=CENTRALISED), CENTRALISED, "black", "-")
    _label(axes, f"All methods, {split} split, mean over agents and seeds")


def _ranks(axes: Any, records: Sequence[Record], split: str, title: str) -> None:
    """What each rank gets of the average, and what the average itself would give."""
    exact = choose(records, method="ours, exact", split=split)
    colors = ("tab:orange", "tab:green", "tab:blue", "tab:purple", "tab:pink", "tab:olive")
    for rank, color in zip(values(exact, "rank"), colors, strict=False):
        _line(axes, choose(exact, rank=rank), f"cut to rank {rank}", color, "-")
    _line(axes, choose(exact, measure=UNTRUNCATED), "not cut", "black", "--")
    kept = choose(records, method="ours, residual kept", split=split)
    _line(axes, kept, "residual kept in the base weights", "tab:red", "-")
    _label(axes, f"What truncation at load takes, {title}")


def _line(axes: Any, records: Sequence[Record], label: str, color: str, style: str) -> None:
    found = [record for record in records if "beside" not in record and "exported" not in record]
    points = [(number, mean(choose(found, round=number), "accuracy")) for number in sorted(values(found, "round"))]
    shown = [(number, 100 * accuracy) for number, accuracy in points if accuracy is not None]
    if shown:
        axes.plot(*zip(*shown, strict=True), style, color=color, label=label, marker=".")


def _label(axes: Any, title: str) -> None:
    axes.set_xlabel("round")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("accuracy, %")
    axes.set_title(title)
    axes.legend(fontsize=7)
