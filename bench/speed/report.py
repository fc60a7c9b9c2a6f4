"""The report of a run: one function a table, so that docs/benchmarks.md takes the same tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from bench.machine import machine_sentence
from bench.records import Record, choose, markdown, values
from bench.speed.load import Workload
from bench.speed.scenarios import PRICE_RUN, PRICES

MB: Final = 1e6
_PHASES: Final = ("factors", "basis", "cipher", "sum")
_STEPS: Final = (
    ("seconds_factors_upload", "factors up"),
    ("seconds_he_encrypt", "encrypt"),
    ("seconds_cipher_upload", "ciphertext up"),
    ("seconds_download", "average down"),
    ("seconds_he_decrypt", "decrypt"),
    ("seconds_apply", "open, re-fit, save"),
)

Records = Mapping[str, Sequence[Record]]


def render(result: Mapping[str, Any], workload: Workload) -> str:
    """The whole report."""
    return (
        "\n\n".join(
            ["# Speed, bytes and memory", *(f"## {title}\n\n{text}" for title, text in titled(result, workload))]
        )
        + "\n"
    )


def titled(result: Mapping[str, Any], workload: Workload) -> list[tuple[str, str]]:
    """Sections with their titles."""
    found = sections(result, workload)
    titles = {
        "run": "Machine",
        "workload": "Published workload",
        "published": "The published implementation's own figures",
        "phases": "Where a round's time goes",
        "vectors": "The same vectors through TenSEAL",
        "price": "Price of privacy, without training",
        "training": "Price of privacy, with the demonstration's training",
        "scale": "Growth of the aggregator's computations",
    }
    return [(title, found[name]) for name, title in titles.items()]


def sections(result: Mapping[str, Any], workload: Workload) -> dict[str, str]:
    """Generated text by section name."""
    records: Records = result["records"]
    seconds = sum(result["seconds"].values())
    return {
        "run": f"{machine_sentence(result['machine'])} Measured in {seconds / 60:.0f} minutes.",
        "workload": compare(records, workload),
        "published": published(workload),
        "phases": phases(records, workload),
        "vectors": vectors(records["vectors"]),
        "price": price(records["price"]),
        "training": training(records["training"]),
        "scale": scale(records),
    }


def compare(records: Records, workload: Workload) -> str:
    """Every run beside the re-created baseline of the same run and the published bytes."""
    rows = []
    for name, run in workload.runs.items():
        found, theirs = records[name], choose(records["baseline"], part="workload", budget=run.budget(0))
        rounds, use, error = choose(found, part="round"), choose(found, part="use")[0], choose(found, part="error")
        ours_s, bytes_up = median(rounds, "seconds"), rounds[-1]["cipher_bytes_up"]
        stated = workload.published.get(run.budget(0))
        rows.append(
            [
                name,
                f"{ours_s:.2f} ({_range(rounds, 'seconds')})",
                f"{theirs[0]['total_s']:,.0f}",
                f"**{theirs[0]['total_s'] / ours_s:,.0f} x**",
                f"{bytes_up / MB:.2f}",
                f"{stated['up_mb']:,.1f} ({stated['up_mb'] * MB / bytes_up:,.0f} x)" if stated else "-",
                f"{error[0]['max_abs_error']:.1e}" if error else "-",
                f"{use['agent_peak_bytes'] / 2**20:.0f} / {use['server_peak_bytes'] / 2**20:.0f}",
            ]
        )
    head = [
        "columns, packing", "ours, s (range)", "re-created, s", "ratio", "ciphertext up, MB an agent",
        "published, MB an agent", "largest error", "peak RSS agent / aggregator, MiB",
    ]  # fmt: skip
    pair = choose(records["baseline"], part="pair")[0]
    steps = ", ".join(
        f"{step} {pair[f'{step}_s']:.2f}" for step in ("encrypt", "multiply", "add", "decrypt", "average", "svd")
    )
    note = (
        f"The re-created procedure was measured on {pair['pairs']} of {_first(workload).modules} pairs with "
        f"{pair['columns']} encrypted columns each (seconds a pair: {steps}) and scaled: all steps by pairs, the first "
        f"four also by columns. Its largest error was {pair['max_abs_error']:.1e}."
    )
    return f"{markdown(head, rows)}\n\n{note}"


def headline(records: Records, workload: Workload) -> str:
    """The same in short, for the README."""
    rows = []
    for name, run in workload.runs.items():
        theirs = choose(records["baseline"], part="workload", budget=run.budget(0))[0]
        rounds, error = choose(records[name], part="round"), choose(records[name], part="error")
        stated = workload.published.get(run.budget(0))
        up = rounds[-1]["cipher_bytes_up"]
        rows.append(
            [
                name,
                f"{median(rounds, 'seconds'):.1f} s",
                f"{theirs['total_s']:,.0f} s",
                f"{theirs['total_s'] / median(rounds, 'seconds'):,.0f} x",
                f"{up / MB:.2f} MB",
                f"{stated['up_mb']:,.0f} MB" if stated else "-",
                f"{error[0]['max_abs_error']:.0e}" if error else "-",
            ]
        )
    head = ["columns encrypted", "ours", "published procedure, re-created", "faster", "ciphertext an agent",
            "published", "largest error"]  # fmt: skip
    return markdown(head, rows)


def published(workload: Workload) -> str:
    """What the published implementation says of itself; hardware not stated."""
    rows = [
        [budget, *(f"{stated[key]:,g}" for key in ("encrypt_s", "multiply_s", "svd_s", "total_s", "up_mb", "down_mb")),
         f"{stated['max_error']:.1e}"]
        for budget, stated in workload.published.items()
    ]  # fmt: skip
    head = ["columns", "encrypt s", "server multiply s", "SVD s", "total s", "ciphertext up, MB an agent", "down, MB",
            "largest error"]  # fmt: skip
    return markdown(head, rows)


def phases(records: Records, workload: Workload) -> str:
    """Medians over rounds: the aggregator's phases, then steps of the slowest agent."""
    head = ["columns, packing", *(f"phase {phase}" for phase in _PHASES), *(text for _, text in _STEPS),
            "aggregator CPU"]  # fmt: skip
    rows = []
    for name in workload.runs:
        rounds, use = choose(records[name], part="round"), choose(records[name], part="use")[0]
        cells = [f"{median(rounds, f'phase_{phase}_s'):.2f}" for phase in _PHASES]
        cells += [f"{median(rounds, key):.2f}" for key, _ in _STEPS]
        rows.append([name, *cells, f"{use['server_cpu_s']:.2f}"])
    return f"Seconds.\n\n{markdown(head, rows)}"


def vectors(records: Sequence[Record]) -> str:
    """Both libraries on the same vectors."""
    rows = []
    for library in values(records, "library"):
        found = choose(records, library=library)
        each = 1e6 / found[0]["values"]
        rows.append(
            [
                library,
                *(f"{median(found, f'{step}_s') * each:.3f}" for step in ("encrypt", "add", "decrypt")),
                f"{found[0]['bytes'] / found[0]['values']:.1f}",
                f"{max(record['max_abs_error'] for record in found):.1e}",
            ]
        )
    head = ["library", "encrypt and serialize, us a value", f"add {records[0]['agents']} agents, us a value",
            "decrypt, us a value", "bytes a value", "largest error of the mean"]  # fmt: skip
    return markdown(head, rows)


def price(records: Sequence[Record]) -> str:
    """Bytes and seconds of rounds without training, against plaintext averaging."""
    plain = choose(records, method="plaintext", part="round")
    base = plain[-1]["bytes_up"] + plain[-1]["bytes_down"]
    rows = []
    for method in ("plaintext", *(name for name, _, _ in PRICES)):
        rounds = choose(records, method=method, part="round")
        up, down = rounds[-1]["bytes_up"], rounds[-1]["bytes_down"]
        rows.append(
            [
                method,
                f"{up / MB:.2f}",
                f"{down / MB:.2f}",
                f"**{(up + down) / base:.2f} x**",
                f"{median(rounds, 'seconds'):.2f} ({_range(rounds, 'seconds')})",
            ]
        )
    run = PRICE_RUN
    note = (
        f"{run.agents} agents, {run.modules} modules of {run.out_features} x {run.in_features}, rank {run.rank(0)}; "
        "plaintext is the mean of A and B in float32 over the same gRPC, TLS and chunks, with nothing durable."
    )
    return f"{note}\n\n{markdown(['method', 'up, MB', 'down, MB', 'up + down', 'seconds a round (range)'], rows)}"


def training(records: Sequence[Record]) -> str:
    """Seconds of rounds with training."""
    base = median(choose(records, method="plaintext", part="round"), "seconds")
    rows = []
    for method in values(records, "method"):
        rounds = choose(records, method=method, part="round")
        seconds = median(rounds, "seconds")
        rows.append([method, f"{seconds:.1f} ({_range(rounds, 'seconds')})", f"**{seconds / base:.2f} x**"])
    return markdown(["method", "seconds a round (range)", "against plaintext"], rows)


def scale(records: Records) -> str:
    """Growth laws along every axis: y proportional to x^exponent between the first and the last value."""
    rows = []
    for name in (unit for unit in records if unit.startswith("scale ")):
        found = records[name]
        first, last = found[0], found[-1]
        rows.append(
            [
                found[0]["sweep"],
                f"{first['value']:,} to {last['value']:,}",
                f"{first['cpu_s']:.2f} to {last['cpu_s']:.2f}",
                f"{exponent(found, 'cpu_s'):.2f}",
                f"{_ratio(found, 'predicted_cpu_s', 'cpu_s')}",
                f"{_grown(first) / 2**20:.0f} to {_grown(last) / 2**20:.0f}",
                f"{last['predicted_ram_bytes'] / 2**20:.0f}",
                f"{last['cipher_bytes'] / MB:.2f}",
                f"{last['average_bytes'] / MB:.1f}",
                f"{last['predicted_average_bytes'] / last['average_bytes']:.4f}",
            ]
        )
    head = ["axis", "values", "CPU s a round", "exponent", "predicted / measured CPU", "RAM for it, MiB",
            "predicted for the last, MiB", "ciphertext an agent, MB", "average, MB",
            "predicted / measured bytes"]  # fmt: skip
    return markdown(head, rows)


def exponent(records: Sequence[Record], key: str) -> float:
    """Slope of the least-squares line through the logarithms."""
    x, y = (np.log([max(float(record[name]), 1e-3) for record in records]) for name in ("value", key))
    return float(np.polyfit(x, y, 1)[0])


def median(records: Sequence[Record], key: str) -> float:
    """Median over repeats; NaN where nothing was measured."""
    found = [float(record[key]) for record in records if key in record]
    return float(np.median(found)) if found else float("nan")


def _grown(record: Record) -> float:
    """Memory beyond what the process had before it computed."""
    return float(record["peak_bytes"] - record["idle_bytes"])


def _ratio(records: Sequence[Record], key: str, other: str) -> str:
    found = [float(record[key]) / max(float(record[other]), 1e-3) for record in records]
    return f"{min(found):.2f} to {max(found):.2f}"


def _range(records: Sequence[Record], key: str) -> str:
    found = [float(record[key]) for record in records]
    return f"{min(found):.2f} to {max(found):.2f}"


def _first(workload: Workload) -> Any:
    return next(iter(workload.runs.values()))
