from __future__ import annotations

from bench.parity import report
from bench.parity.methods import Ours, OursKeeping


def final(name, seed, rank, accuracy, **more):
    return {
        "method": name,
        "split": "skewed",
        "seed": seed,
        "rank": rank,
        "round": 5,
        "whole": True,
        "accuracy": accuracy,
        **more,
    }


def test_gains_are_between_the_same_seeds_and_exported_adapters_have_a_row_of_their_own():
    records = [
        final(Ours.name, 0, 2, 0.50), final(Ours.name, 0, 4, 0.60),
        final(Ours.name, 1, 2, 0.70), final(Ours.name, 1, 4, 0.80),
        final(OursKeeping.name, 0, 2, 0.62), final(OursKeeping.name, 0, 4, 0.62),
        final(OursKeeping.name, 1, 2, 0.78), final(OursKeeping.name, 1, 4, 0.78),
        final(OursKeeping.name, 0, 2, 0.10, exported=True), final(OursKeeping.name, 1, 4, 0.20, exported=True),
    ]  # fmt: skip
    assert report.by_rank(records, "skewed").splitlines()[2:] == [
        "| exact, % | 60.0 ± 10.0 | 70.0 ± 10.0 | 65.0 ± 10.0 |",
        "| residual kept, % | 70.0 ± 8.0 | 70.0 ± 8.0 | 70.0 ± 8.0 |",
        "| residual kept, exported, % | 10.0 ± 0.0 | 20.0 ± 0.0 | 15.0 ± 5.0 |",
    ]
    assert report.gains(records, "skewed").splitlines()[2:] == ["| 5 | +10.0 ± 2.0 | +0.0 ± 2.0 | +5.0 ± 2.0 |"]
