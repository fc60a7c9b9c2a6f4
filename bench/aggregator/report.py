"""The report: one function a table, so that docs/benchmarks.md takes the same tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from bench.machine import machine_sentence
from bench.records import Record, choose, markdown, values

_MB: Final = 1e6
_GB: Final = 1e9

Records = Mapping[str, Sequence[Record]]


def render(result: Mapping[str, Any]) -> str:
    """The whole report."""
    titles = {"sums": "Residue sums", "ingest": "Ingest", "memory": "Memory", "fleet": "Fleets", "distance": "Distance"}
    found = sections(result)
    parts = ["# The aggregator's throughput", machine_sentence(result["machine"])]
    return "\n\n".join([*parts, *(f"## {title}\n\n{found[name]}" for name, title in titles.items())]) + "\n"


def sections(result: Mapping[str, Any]) -> dict[str, str]:
    """Generated text by section name."""
    records: Records = result["records"]
    return {
        "sums": sums(records["sums"]),
        "ingest": ingest(records),
        "memory": memory(records["memory"]),
        "fleet": fleet(records["fleet"]),
        "distance": distance(records["distance"]),
    }


def sums(records: Sequence[Record]) -> str:
    """Bytes of summands a second, and their share of the memory copy by as many threads in the same repeat."""
    names = {"copy": "memory copy", "add": "`add_residues`", "kernel": "arithmetic of the sum", "fold": "sum of files"}
    rows = []
    for what, title in names.items():
        for terms in values(choose(records, what=what), "terms") or [None]:
            for threads in values(choose(records, what=what), "threads"):
                found = choose(records, what=what, threads=threads, **({} if terms is None else {"terms": terms}))
                shares = [_rate(record) / _rate(_copy(records, record)) for record in found]
                rate = float(np.median([_rate(record) for record in found])) / _GB
                share = "" if what == "copy" else _percent(float(np.median(shares)))
                rows.append([title, "" if terms is None else str(terms), str(threads), f"{rate:.1f}", share])
    return markdown(["", "summands", "threads", "GB/s", "of the copy"], rows)


def ingest(records: Records) -> str:
    """The product beside a bare server: the same client code, and the same messages alone."""
    rows = []
    for name in ("one", "four", "small"):
        # The first round also loads code and fills caches.
        found = [record for record in records[name] if record["round"] > 1]
        size, at_once = found[0]["bytes"], found[0]["at_once"]
        same = [record["bare_s"] / record["product_s"] for record in found]
        stream = [record["stream_s"] / record["product_s"] for record in found]
        rows.append([f"{at_once} x {size / at_once / _MB:.3g} MB"])
        rows[-1] += [f"{1000 * _median(found, key):.0f} ms" for key in ("product_s", "bare_s", "stream_s")]
        rows[-1] += [_percent(float(np.median(same))), _percent(float(np.median(stream)))]
        rows[-1].append(
            " / ".join(f"{1e9 * _median(found, key) / size:.1f}" for key in ("product_cpu_s", "bare_cpu_s"))
        )
    head = ["uploads at once", "aggregator", "bare server", "bare stream", "of the bare server", "of the bare stream"]
    return markdown([*head, "server CPU, ms/MB"], rows)


def memory(records: Sequence[Record]) -> str:
    """Resident memory by cohort."""
    rows = [
        [str(record[key]) for key in ("places", "agents", "rounds")]
        + [f"{record[key] / _MB:.0f} MB" for key in ("bytes", "idle_bytes", "sampled_bytes", "most_bytes")]
        for record in records
    ]
    head = ["`connected_agents`", "agents", "rounds", "ciphertext", "resident before", "most meanwhile", "most ever"]
    return markdown(head, rows)


def fleet(records: Sequence[Record]) -> str:
    """What an agent costs in a round, by cohort."""
    rows = [
        [
            str(record["places"]),
            str(record["agents"]),
            f"{record['seconds']:.1f} s",
            f"{1e3 * record['cpu_s'] / record['agents']:.0f} ms",
            f"{record['most_bytes'] / _MB:.0f} MB",
        ]
        for record in records
    ]
    head = ["`connected_agents`", "agents", "registration to publication", "aggregator CPU an agent", "most resident"]
    return markdown(head, rows)


def distance(records: Sequence[Record]) -> str:
    """Megabytes a second over a long line, by round trip and window."""
    rows = []
    for round_trip_s in values(records, "round_trip_s"):
        for window in values(choose(records, round_trip_s=round_trip_s), "window_bytes"):
            found = choose(records, round_trip_s=round_trip_s, window_bytes=window)
            size = found[0]["bytes"]
            rates = [size / _MB / _median(found, key) for key in ("up_s", "down_s")]
            rows.append(
                [f"{1e3 * round_trip_s:.0f} ms", f"{window / (1 << 20):g} MiB", *(f"{rate:.0f}" for rate in rates)]
            )
    return markdown(["round trip", "upload window", "upload, MB/s", "download, MB/s"], rows)


def _copy(records: Sequence[Record], like: Record) -> Record:
    return choose(records, what="copy", threads=like["threads"], repeat=like["repeat"])[0]


def _rate(record: Record) -> float:
    return float(record["bytes"] / record["seconds"])


def _median(records: Sequence[Record], key: str) -> float:
    return float(np.median([record[key] for record in records]))


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
