"""The demonstration as a stranger runs it: real processes, real training, real ciphertexts; on part of the example."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "data"
RANKS = {"agent-1": 8, "agent-2": 16, "agent-3": 32}
BUDGETS = {"agent-1": "full", "agent-2": "25%", "agent-3": "5%"}
SHARES = {"agent-1": 1.0, "agent-2": 0.25, "agent-3": 0.05}
ROUNDS = 2
BLOCK_BYTES = 65_536
VALUES_PER_BLOCK = 4_096

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# Loads adapters the way their users do, and asks them.
LOADER = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer
test, *folders = sys.argv[1:]
rows = [json.loads(line) for line in open(test)]
for folder in folders:
    config = json.load(open(f"{folder}/adapter_config.json"))
    labels = json.load(open(f"{folder}/labels.json"))
    source = config["base_model_name_or_path"]
    base = AutoModelForSequenceClassification.from_pretrained(source, num_labels=len(labels))
    model = PeftModel.from_pretrained(base, folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    texts = [row["text"] for row in rows]
    with torch.no_grad():
        batch = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
        found = model(**batch).logits.argmax(-1).tolist()
    right = sum(labels[index] == row["label"] for index, row in zip(found, rows))
    rows_of_a = sorted({value.shape[0] for name, value in model.named_parameters() if ".lora_A." in name})
    print(json.dumps({"rank": config["r"], "accuracy": right / len(rows), "rows_of_a": rows_of_a}))
"""


@dataclass(frozen=True)
class Run:
    """One finished demonstration."""

    out: Path
    code: int
    output: str
    report: dict[str, Any]


def command(out: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "services.operators.demo", "--out", str(out), *arguments]


def write_part(source: Path, target: Path, every: int) -> None:
    target.write_text("".join(source.read_text(encoding="utf-8").splitlines(keepends=True)[::every]), encoding="utf-8")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("demo")
    write_part(EXAMPLES / "routing_train.jsonl", folder / "train.jsonl", 3)
    write_part(EXAMPLES / "routing_test.jsonl", folder / "test.jsonl", 4)
    arguments = ["--data", str(folder / "train.jsonl"), "--test", str(folder / "test.jsonl"), "--agents", "3"]
    arguments += ["--rounds", str(ROUNDS), "--ranks", ",".join(map(str, RANKS.values()))]
    arguments += ["--budgets", ",".join(BUDGETS.values())]
    done = subprocess.run(
        command(folder / "out", *arguments), cwd=ROOT, capture_output=True, text=True, timeout=840, check=False
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-5000:]
    return Run(folder / "out", done.returncode, output, json.loads((folder / "out" / "report.json").read_text()))


def test_report_has_the_promised_form(run: Run) -> None:
    report = run.report
    assert report["accuracy"].keys() == {"before", "after"}
    assert report["accuracy"]["before"].keys() == report["accuracy"]["after"].keys() == RANKS.keys()
    assert [found["round"] for found in report["rounds"]] == [1, 2]
    for found in report["rounds"]:
        assert sorted(found["cohort"]) == sorted(found["counted"]) == sorted(RANKS)
        for key in ("bytes_up", "bytes_down", "cipher_bytes_up"):
            assert found[key].keys() == RANKS.keys()
            assert all(isinstance(count, int) and count > 0 for count in found[key].values())
        assert {"train", "factors", "basis", "cipher", "sum"} <= found["seconds"].keys()
        assert all(seconds >= 0 for seconds in found["seconds"].values())
    assert report["adapters"].keys() == RANKS.keys()


def test_decrypted_averages_equal_float64_averages(run: Run) -> None:
    verification = run.report["verification"]
    plan = run.report["plan"]
    values = sum(m * n for _, m, n in plan["modules"]) + sum(math.prod(shape) for _, shape in plan["dense"])
    assert verification["values"] == ROUNDS * values
    assert verification["comparisons"] == len(RANKS) * ROUNDS * values
    assert 0 < verification["max_abs_error"] <= 1e-6
    assert verification["passed"] is True
    assert "PASSED" in run.output


def test_small_budgets_are_named_and_allowed(run: Run) -> None:
    assert "leakage: unsafe for agent-2, agent-3" in run.output
    assert "--allow-unsafe" in run.output


def test_every_agent_gains(run: Run) -> None:
    accuracy = run.report["accuracy"]
    for agent in RANKS:
        assert accuracy["after"][agent] >= accuracy["before"][agent] + 0.15, accuracy


def test_bytes_follow_the_formulas(run: Run) -> None:
    """docs/method.md section 7, computed here by hand."""
    plan = run.report["plan"]
    dense = sum(math.prod(shape) for _, shape in plan["dense"])
    s = min(sum(RANKS.values()), plan["basis_cap"])
    columns = {
        agent: [max(1, math.floor(share * n + 0.5)) for _, _, n in plan["modules"]] for agent, share in SHARES.items()
    }
    for agent, counts in columns.items():
        assert run.report["agents"][agent]["columns"] == counts

    def cipher(counts: Sequence[int]) -> int:
        return BLOCK_BYTES * -(-(dense + sum(s * k for k in counts)) // VALUES_PER_BLOCK)

    shapes = [(m, n) for _, m, n in plan["modules"]]
    average = 4 * sum(m * s + s * (n - k) for (m, n), k in zip(shapes, columns["agent-3"], strict=True))
    for found in run.report["rounds"]:
        for agent, rank in RANKS.items():
            factors = 4 * sum(m * rank + rank * (n - k) for (m, n), k in zip(shapes, columns[agent], strict=True))
            down = 4 * rank * s * len(shapes) + average + cipher(columns["agent-1"])
            assert found["cipher_bytes_up"][agent] == cipher(columns[agent])
            assert found["bytes_up"][agent] == pytest.approx(factors + cipher(columns[agent]), rel=0.02)
            assert found["bytes_down"][agent] == pytest.approx(down, rel=0.02)


def test_a_budget_of_five_percent_sends_about_a_twentieth(run: Run) -> None:
    for found in run.report["rounds"]:
        sent = found["cipher_bytes_up"]
        assert sent["agent-1"] / 25 < sent["agent-3"] < sent["agent-1"] / 15


def test_adapters_load_in_peft_at_their_own_rank(run: Run) -> None:
    folders = [run.report["adapters"][agent] for agent in RANKS]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-c", LOADER, str(run.out / "data" / "test.jsonl"), *folders],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for (agent, rank), line in zip(RANKS.items(), done.stdout.splitlines(), strict=True):
        found = json.loads(line)
        assert found["rank"] == rank
        assert found["rows_of_a"] == [rank]
        assert found["accuracy"] == pytest.approx(run.report["accuracy"]["after"][agent], abs=0.02)


def test_who_holds_what_afterwards(run: Run) -> None:
    """No secret lies where the aggregator or the operator could read it."""
    for folder in (run.out / "aggregator", run.out / "operator"):
        names = {path.name for path in folder.rglob("*") if path.is_file()}
        assert not names & {"hpke.key", "kek"}
        assert not [path for path in folder.rglob("*") if "sealed" in path.name]


def test_interrupted_in_the_same_folder_it_leaves_no_process(run: Run) -> None:
    demo = subprocess.Popen(
        command(run.out, "--agents", "2", "--rounds", "1"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert demo.stdout is not None
    try:
        seen = ""
        while "agent-1: preparing" not in seen:
            line = demo.stdout.readline()
            assert line, f"ended with {demo.wait()}: {seen}"
            seen += line
        children = psutil.Process(demo.pid).children(recursive=True)
        assert len(children) == 4
        assert not (run.out / "report.json").exists()
        os.killpg(demo.pid, signal.SIGINT)
        rest = demo.stdout.read()
        assert demo.wait(timeout=60) == 130, rest
        assert "interrupted" in rest
        assert [child for child in children if child.is_running()] == []
    finally:
        demo.kill()
        demo.wait()
        demo.stdout.close()
