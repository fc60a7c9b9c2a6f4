"""A run's records as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, Final

import numpy as np

from bench.machine import machine_sentence
from bench.parity.methods import FedIt, FlexLora, Flora, HetLora, Ours, OursCapped, OursDense, OursKeeping
from bench.parity.scenarios import CENTRALISED, METHODS, UNTRUNCATED
from bench.records import Record, choose, markdown, mean, values

PEERS: Final = (FedIt.name, HetLora.name, FlexLora.name, Flora.name)

ADAPTERS_WITHIN: Final = 1e-6
CLOSE_POINTS: Final = 0.5
BESIDE_PEERS_POINTS: Final = 1.0


def render(generated: Mapping[str, str]) -> str:
    """The report of generated sections."""
    titles = {
        "parity_run": "Run",
        "parity_claims": "Claims",
        "parity_accuracy": "Accuracy",
        "parity_beside": "Beside FlexLoRA, from the same trained adapters",
        "parity_dilution": "What cutting an average to an agent's rank takes",
        "parity_routing": "The same with more classes",
        "parity_skew": "Agents with hardly more than one label",
    }
    parts = [f"## {titles[name]}\n\n{text}" for name, text in generated.items()]
    return "# Accuracy parity\n\n" + "\n\n".join(parts) + "\n"


def sections(result: Mapping[str, Any]) -> dict[str, str]:
    """Generated text of the main study, by section name."""
    records = list(chain.from_iterable(result["records"].values()))
    return {
        "parity_run": run(result),
        "parity_claims": claims(records),
        "parity_accuracy": "\n\n".join(
            f"Split: {split}.\n\n{accuracy(records, split)}" for split in values(records, "split")
        ),
        "parity_beside": beside(records),
        "parity_dilution": "\n\n".join(
            f"Split: {split}.\n\n{dilution(records, split)}" for split in values(records, "split")
        ),
    }


def run(result: Mapping[str, Any]) -> str:
    """What was run, on what."""
    stamp, setting = result["stamp"], result["stamp"]["setting"]
    train, test = stamp["texts"]
    seeds = sorted({record["seed"] for record in chain.from_iterable(result["records"].values())})
    curve = setting["curve_texts"]
    looked_at = "after every round" if curve is None else f"after the last round, {curve} after others"
    return (
        f"{train:,} {stamp['corpus']} to learn from, {test:,} to test on (all of them {looked_at}); "
        f"agents of ranks {', '.join(map(str, setting['ranks']))}; "
        f"{setting['rounds']} rounds of {setting['steps']} steps of {setting['batch_size']} texts, cut to "
        f"{setting['max_tokens']} tokens; seeds {', '.join(map(str, seeds))}; "
        f"{sum(result['seconds'].values()) / 60:.0f} minutes on {machine_sentence(result['machine'])}"
    )


def accuracy(records: Sequence[Record], split: str) -> str:
    """Accuracy after the last round, by method and rank."""
    final = final_models(records)
    ranks = values(choose(final, split=split), "rank")
    rows = []
    central = choose(final, method=CENTRALISED)
    rows.append([CENTRALISED, *("" for _ in ranks), with_deviation(central), ""])
    for kind in METHODS.values():
        found = choose(final, method=kind.name, split=split)
        by_rank = [points(mean(choose(found, rank=rank), "accuracy")) for rank in ranks]
        sent = mean(found, "sent_bytes")
        rows.append([kind.name, *by_rank, with_deviation(found), "-" if sent is None else f"{sent / 1e6:.1f}"])
    head = [
        "method",
        *(f"rank {rank}, %" for rank in ranks),
        "all agents, % (± over seeds)",
        "MB up, an agent and round",
    ]
    return markdown(head, rows)


def claims(records: Sequence[Record]) -> str:
    """What was to be shown, and what was found."""
    final, rows = final_models(records), []
    same = choose(records, beside=FlexLora.name)
    if same:
        largest = max(max(record["factor_difference"], record["dense_difference"]) for record in same)
        rows.append(
            ["exact equals FlexLoRA in adapters", f"within {ADAPTERS_WITHIN:g}", f"{largest:.1e}",
             verdict(largest <= ADAPTERS_WITHIN)]
        )  # fmt: skip
        apart = max(abs(record["accuracy_difference"]) for record in same)
        rows.append(["exact equals FlexLoRA in accuracy", "0", f"{100 * apart:.2f} points", verdict(apart == 0)])
    for name in (OursCapped.name, OursDense.name):
        for split in values(final, "split"):
            gap = difference(final, split, name, Ours.name)
            if gap is not None:
                rows.append(
                    [f"{name} beside exact, {split} split", f"within {CLOSE_POINTS} points", f"{gap:+.2f} points",
                     verdict(abs(gap) <= CLOSE_POINTS)]
                )  # fmt: skip
    for name in (Ours.name, OursKeeping.name):
        for split in values(final, "split"):
            gaps = behind_peers(final, split, name)
            if gaps:
                worst = min(gaps.values())
                found = ", ".join(f"rank {rank} {gap:+.1f}" for rank, gap in gaps.items())
                rows.append(
                    [f"{name}, each rank beside its best peer, {split} split",
                     f"{BESIDE_PEERS_POINTS:g} point behind at most", found, verdict(worst >= -BESIDE_PEERS_POINTS)]
                )  # fmt: skip
    return markdown(["claim", "wanted", "measured", ""], rows)


def beside(records: Sequence[Record]) -> str:
    """The protocol's adapters and those of FlexLoRA, by round."""
    same = choose(records, beside=FlexLora.name)
    rows = []
    for number in sorted(values(same, "round")):
        found = choose(same, round=number)
        rows.append(
            [
                str(number),
                *(
                    f"{max(abs(record[key]) for record in found):.1e}"
                    for key in ("update_difference", "factor_difference", "dense_difference", "loss_difference")
                ),
                f"{100 * max(abs(record['accuracy_difference']) for record in found):.2f}",
            ]
        )
    head = ["round", "entries of the updates", "entries of A and B", "dense tensors", "loss", "accuracy, points"]
    return "Largest difference over agents, splits and seeds:\n\n" + markdown(head, rows)


def dilution(records: Sequence[Record], split: str) -> str:
    """The average before and after cutting, and with what is cut away kept in the base weights."""
    exact = [r for r in choose(records, method=Ours.name, split=split) if "beside" not in r]
    kept = choose(records, method=OursKeeping.name, split=split)
    ranks, rows = values(exact, "rank"), []
    for number in sorted(values(exact, "round")):
        found = choose(exact, round=number)
        cut = [points(mean(choose(found, rank=rank), "accuracy")) for rank in ranks]
        whole = points(mean(choose(found, measure=UNTRUNCATED), "accuracy"))
        working = [record for record in choose(kept, round=number) if "exported" not in record]
        rows.append([str(number), *cut, whole, points(mean(working, "accuracy"))])
    exported = [f"rank {rank} {points(mean(choose(kept, exported=True, rank=rank), 'accuracy'))}" for rank in ranks]
    head = ["round", *(f"cut to {rank}, %" for rank in ranks), "not cut, %", "residual kept, %"]
    tail = f"Adapters exported after the last round with the residual kept, %: {', '.join(exported)}."
    return f"{markdown(head, rows)}\n\n{tail}"


def routing(result: Mapping[str, Any]) -> str:
    """The study of rank dilution alone: what was run, accuracy by round, accuracy after the last one."""
    records = list(chain.from_iterable(result["records"].values()))
    parts = [run(result)]
    for split, concentration in result["stamp"]["setting"]["concentrations"].items():
        parts.append(f"Split: {split} (Dirichlet, {concentration:g}); mean over seeds.")
        parts += [
            dilution(records, split),
            "Points gained by keeping the residual, between the same seeds (± over them):",
            gains(records, split),
            "After the last round (± over seeds):",
            by_rank(records, split),
        ]
    return "\n\n".join(parts)


def skew(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One-sided agents trained in several ways: what was run, accuracy by round.

    Args:
        results: the study of each way, by its title.
    """
    rows, shares, rounds = [], [], []
    for title, result in results.items():
        working = working_models(list(chain.from_iterable(result["records"].values())))
        shares += [record["commonest"] for record in working]
        rounds = sorted(values(working, "round"))
        rows.append([title, *(with_deviation(choose(working, round=number)) for number in rounds)])
    head = ["training", *(f"round {number}, %" for number in rounds)]
    low, middle, high = (f"{100 * share:.0f}" for share in np.quantile(shares, (0, 0.5, 1)))
    return "\n\n".join(
        [
            run(next(iter(results.values()))),
            f"Of an agent's texts, {low} to {high} % have the same label (median {middle} %).",
            "Mean over agents, ± over seeds:",
            markdown(head, rows),
        ]
    )


def by_rank(records: Sequence[Record], split: str) -> str:
    """Accuracy after the last round of the exact method and with the residual kept."""
    final = final_models(records)
    exact, kept = (choose(final, method=name, split=split) for name in (Ours.name, OursKeeping.name))
    exported = choose(records, method=OursKeeping.name, split=split, exported=True)
    ranks, rows = values(exact, "rank"), []
    for name, found in (("exact", exact), ("residual kept", kept), ("residual kept, exported", exported)):
        rows.append(
            [f"{name}, %", *(with_deviation(choose(found, rank=rank)) for rank in ranks), with_deviation(found)]
        )
    return markdown(["", *(f"rank {rank}" for rank in ranks), "all agents"], rows)


def gains(records: Sequence[Record], split: str) -> str:
    """What keeping the residual gains over the exact method, by round and rank."""
    working = working_models(records)
    exact, kept = (choose(working, method=name, split=split) for name in (Ours.name, OursKeeping.name))
    ranks, rows = values(exact, "rank"), []
    for number in sorted(values(exact, "round")):
        before, after = choose(exact, round=number), choose(kept, round=number)
        cells = [gain(choose(before, rank=rank), choose(after, rank=rank)) for rank in ranks]
        rows.append([str(number), *cells, gain(before, after)])
    return markdown(["round", *(f"rank {rank}" for rank in ranks), "all agents"], rows)


def gain(before: Sequence[Record], after: Sequence[Record]) -> str:
    """Points gained with the same seeds, mean and standard deviation over them."""
    pairs = [
        [mean(choose(found, seed=seed), "accuracy") for found in (before, after)] for seed in values(after, "seed")
    ]
    found = [100 * (two - one) for one, two in pairs if one is not None and two is not None]
    return f"{np.mean(found):+.1f} ± {np.std(found):.1f}" if found else "-"


def working_models(records: Sequence[Record]) -> list[Record]:
    """What agents worked with after every round."""
    return [record for record in records if not {"beside", "exported", "measure"} & set(record)]


def final_models(records: Sequence[Record]) -> list[Record]:
    """What agents worked with after the last round."""
    return choose(working_models(records), whole=True)


def difference(final: Sequence[Record], split: str, name: str, other: str) -> float | None:
    """Points between two methods, mean over agents and seeds."""
    pair = [mean(choose(final, method=method, split=split), "accuracy") for method in (name, other)]
    return None if pair[0] is None or pair[1] is None else 100 * (pair[0] - pair[1])


def behind_peers(final: Sequence[Record], split: str, name: str) -> dict[int, float]:
    """Points of a method over the best peer, by rank, mean over seeds."""
    gaps = {}
    for rank in values(choose(final, method=name, split=split), "rank"):
        found = choose(final, split=split, rank=rank)
        mine = mean(choose(found, method=name), "accuracy")
        peers = [value for peer in PEERS if (value := mean(choose(found, method=peer), "accuracy")) is not None]
        if mine is not None and peers:
            gaps[rank] = 100 * (mine - max(peers))
    return gaps


def points(value: float | None) -> str:
    """A share in percent, with one digit."""
    return "-" if value is None else f"{100 * value:.1f}"


def with_deviation(records: Sequence[Record]) -> str:
    """Mean over everything, and standard deviation over seeds."""
    by_seed = [mean(choose(records, seed=seed), "accuracy") for seed in values(records, "seed")]
    found = [100 * value for value in by_seed if value is not None]
    return f"{np.mean(found):.1f} ± {np.std(found):.1f}" if found else "-"


def verdict(holds: bool) -> str:
    """Whether a claim holds."""
    return "holds" if holds else "**does not hold**"
