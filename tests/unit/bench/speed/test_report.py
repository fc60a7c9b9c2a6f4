from __future__ import annotations

import re

from bench.pages import fill
from bench.plots import draw_all
from bench.records import Record
from bench.sources import ROOT
from bench.speed import plots, report
from bench.speed.load import read_workload
from bench.speed.runner import PAGE, README
from bench.speed.scenarios import PRICES

WORKLOAD = read_workload(ROOT / "bench" / "speed" / "published.json")
STEPS = ("encrypt", "multiply", "add", "decrypt", "average", "svd")


def rounds(seconds: tuple[float, ...], **common: object) -> list[Record]:
    figures = {
        "cipher_bytes_up": 131072.0, "bytes_up": 2e6, "bytes_down": 3e6, "phase_basis_s": 0.25, "seconds_apply": 0.5
    }  # fmt: skip
    use = {
        "part": "use", "server_cpu_s": 1.0, "server_peak_bytes": 2**28, "server_idle_bytes": 2**27,
        "agent_peak_bytes": 2**27,
    }  # fmt: skip
    of_rounds = [
        {**common, "part": "round", "round": number + 1, "seconds": one, **figures}
        for number, one in enumerate(seconds)
    ]
    return [*of_rounds, {**common, **use}]


def result() -> Record:
    pair = {f"{step}_s": 1.0 for step in STEPS} | {"part": "pair", "pairs": 3, "columns": 4, "max_abs_error": 2e-3}
    baseline = [pair]
    records: dict[str, list[Record]] = {}
    for name, run in WORKLOAD.runs.items():
        if run.packing.value == "exact":
            baseline.append({"part": "workload", "run": name, "budget": run.budget(0), "total_s": 600.0})
        records[name] = [*rounds((1.0, 2.0, 3.0)), {"part": "error", "max_abs_error": 5e-12}]
    vector = {"layers": 1, "agents": 4, "values": 1000, "bytes": 16000, "max_abs_error": 1e-10}
    vector |= {f"{step}_s": 1e-3 for step in STEPS}
    methods = ("plaintext", *(name for name, _, _ in PRICES))
    scaled = {"cpu_s": 1.0, "idle_bytes": 2**25, "peak_bytes": 2**26, "cipher_bytes": 1e6, "average_bytes": 2e6}
    scaled |= {"predicted_average_bytes": 2e6, "predicted_cpu_s": 1.0, "predicted_ram_bytes": 2**24}
    machine = {"cores": 2, "processor": "p", "memory_bytes": 2**34, "system": "Linux", "python": "3", "numpy": "2"}
    return {
        "machine": machine | {"torch": "2", "grpcio": "1", "openfhe": "1"},
        "seconds": {"all": 120.0},
        "records": {
            "baseline": baseline,
            **records,
            "vectors": [{**vector, "library": library} for library in ("shelora", "TenSEAL")],
            "price": [record for method in methods for record in rounds((0.5,), method=method)],
            "training": [*rounds((40.0,), method="plaintext"), *rounds((50.0,), method="full, dense")],
            **{
                f"scale {sweep}": [
                    {**scaled, "sweep": sweep, "value": value, "cpu_s": value / 10} for value in (10, 100)
                ]
                for sweep in ("agents", "rank", "width", "modules")
            },
        },
    }


def test_ratios_are_of_medians_in_the_same_run() -> None:
    first = report.compare(result()["records"], WORKLOAD).splitlines()[2]
    assert "| 2.00 (1.00 to 3.00) | 600 | **300 x** | 0.13 | 24.5 (187 x) | 5.0e-12 |" in first
    assert "| 50.0 (50.00 to 50.00) | **1.25 x** |" in report.training(result()["records"]["training"])
    assert "| 10 to 100 | 1.00 to 10.00 | 1.00 |" in report.scale(result()["records"])


def test_every_generated_section_has_its_place() -> None:
    found = result()
    generated = {f"speed_{name}": text for name, text in report.sections(found, WORKLOAD).items()}
    assert fill(PAGE.read_text(encoding="utf-8"), generated, "speed_")
    headline = {"speed_headline": report.headline(found["records"], WORKLOAD)}
    assert fill(README.read_text(encoding="utf-8"), headline, "speed_")
    assert not re.search(r"\bnan\b", report.price(found["records"]["price"]))
    assert report.render(found, WORKLOAD).count("## ") == len(generated)


def test_plots_are_drawn(tmp_path) -> None:
    drawn = draw_all(plots.draws(result()["records"], WORKLOAD), tmp_path)
    assert {path.name for path in drawn} == {
        f"{name}.{suffix}" for name in ("workload", "price", "scale") for suffix in ("png", "svg")
    }
    assert all(path.stat().st_size > 1000 for path in drawn)
