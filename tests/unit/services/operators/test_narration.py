from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
from rich.console import Console

from services.common.clock import SystemClock
from services.operators.demo.folder import DemoFolder
from services.operators.demo.narration import (
    readable,
    safety_line,
    tell_accuracy,
    tell_bytes,
    tell_end,
    tell_failure,
    tell_start,
    tell_verification,
)
from services.operators.demo.options import DemoOptions, choose
from services.operators.demo.processes import Crew, failure
from services.operators.demo.reader import Example, write_examples
from services.operators.demo.shares import deal
from services.operators.demo.verify import RoundCheck, Verification
from services.operators.domain import RegisteredAgent
from services.operators.planning import explain_registered
from shelora.errors import InvalidConfiguration
from shelora.rounds.phases import AgentTask
from support.operators import make_federation


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=160)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def options(data: Path, test: Path | None) -> DemoOptions:
    return choose(
        data=data, test=test, model="embedded", agents=2, rounds=1, ranks="4", budgets="full,5%", compare=None,
        out=data.parent / "demo",
    )  # fmt: skip


def rows(count: int, labels: tuple[str, ...] = ("[red]no", "yes")) -> list[Example]:
    return [Example(f"text {index}", labels[index % len(labels)]) for index in range(count)]


def test_start_shows_who_has_what(tmp_path, console) -> None:
    write_examples(tmp_path / "all.jsonl", rows(100))
    chosen = options(tmp_path / "all.jsonl", None)
    shares = deal(chosen)
    assert len(shares.test) == 20
    assert sum(len(examples) for examples in shares.train.values()) == 80
    tell_start(console, chosen, DemoFolder(chosen.out), shares)
    assert "[red]no" in said(console)
    assert "20% of it, held out: 20 rows" in " ".join(said(console).split())
    for name in chosen.names:
        assert f"{sum(shares.counts(name).values())}" in said(console)


def test_same_seed_same_shares(tmp_path) -> None:
    write_examples(tmp_path / "all.jsonl", rows(100))
    assert deal(options(tmp_path / "all.jsonl", None)) == deal(options(tmp_path / "all.jsonl", None))


def test_labels_that_training_has_never_seen_are_refused(tmp_path) -> None:
    write_examples(tmp_path / "train.jsonl", rows(100))
    write_examples(tmp_path / "test.jsonl", rows(10, ("yes", "perhaps")))
    with pytest.raises(InvalidConfiguration, match="got also perhaps"):
        deal(options(tmp_path / "train.jsonl", tmp_path / "test.jsonl"))


def test_the_demonstration_says_that_it_allows_small_budgets(console) -> None:
    agents = [
        RegisteredAgent(f"agent-{index}", 4, (k, k), "", "", 0, True, AgentTask.WAIT, 480)
        for index, k in ((1, 8), (2, 32), (3, 32))
    ]
    console.print(safety_line(explain_registered(make_federation(), agents)))
    assert "leakage: unsafe for agent-1, whose budgets leave columns plain: allowed here (--allow-unsafe)" in said(
        console
    )
    console.print(safety_line(explain_registered(make_federation(), agents[1:])))
    assert "leakage: caution" in said(console), "two agents know each other's update"


def test_the_verdict_is_said_in_words(console) -> None:
    good = RoundCheck(1, ("a",), ("a",), 1000, 1000, 2e-9, "module 0 of a")
    tell_verification(console, Verification((good,)))
    assert "PASSED: max_abs_error 2.00e-09 over 1,000 averaged values" in said(console)
    bad = RoundCheck(2, ("a",), ("a",), 1000, 1000, 2e-5, "module 0 of a")
    tell_verification(console, Verification((good, bad)))
    assert "FAILED: max_abs_error 2.00e-05" in said(console)


def test_accuracy_and_bytes(console) -> None:
    tell_accuracy(console, ["a", "b"], {"a": 0.2, "b": None}, {"a": 0.9, "b": None})
    tell_bytes(console, [])
    tell_bytes(console, [1.001, 0.999])
    assert "20.0%" in said(console)
    assert "90.0%" in said(console)
    assert said(console).count("docs/method.md") == 1
    assert "0.9990 to 1.0010" in said(console)


def test_the_end_names_three_commands_and_all_adapters(tmp_path, console) -> None:
    tell_end(console, DemoFolder(tmp_path), {"a": "adapters/a", "b": "adapters/b"}, 6, 61.4)
    text = said(console)
    for part in (
        "done in 61 s",
        "adapters/b",
        "M.from_pretrained('adapters/a', num_labels=6)",
        "make demo DATA=",
        "status --watch",
    ):
        assert part in text


def test_a_failure_shows_the_end_of_the_log(tmp_path, console) -> None:
    crew = Crew(os.environ, tmp_path, SystemClock())
    worker = crew.start("agent-1", ["-c", "print('first'); print('last [word]')"])
    worker.process.wait()
    tell_failure(console, failure(worker, "ended with exit status 1"), crew)
    assert "agent-1 ended with exit status 1" in said(console)
    assert "| last [word]" in said(console)


def test_a_failure_without_a_process(console) -> None:
    tell_failure(console, InvalidConfiguration("ranks: [x]", hint="write numbers"), None)
    assert "invalid_configuration: ranks: [x]" in said(console)
    assert "what to do: write numbers" in said(console)


def test_json_log_lines_become_readable() -> None:
    line = json.dumps({"event": "it broke", "level": "error", "timestamp": "T", "round": 3, "exception": "Traceback"})
    assert readable(line) == "T error it broke round=3\nTraceback"
    for plain in ("no json", "3", "[1]", ""):
        assert readable(plain) == plain
