from __future__ import annotations

import pytest
from rich.console import Console

from services.operators.plan_tables import bytes_table, explanation_tables, seconds_table, verdict_lines
from services.operators.planning import Participant, Rates, Terms, explain, imagine, parse_shapes
from shelora.plan import Packing

SHAPES = parse_shapes("19*384x384,dense*2310")
FOUND = explain(SHAPES, imagine(SHAPES, [4, 8, 16, 32], ["full", "25%", "5%", "full"]))


def text(renderable: object, width: int = 100) -> str:
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


@pytest.mark.parametrize("width", [100, 160])
def test_all_of_it_fits_a_terminal(width) -> None:
    shown = text(explanation_tables(FOUND), width)
    assert max(len(line) for line in shown.splitlines()) <= width
    for part in ("agent-4", "100.0%", "RAM", "CPU", "error, bound", "128 bits", "agent-2: unsafe", "basis rows 60"):
        assert part in shown
    assert "…" not in shown


def test_agents_that_are_alike_share_a_line() -> None:
    many = explain(SHAPES, imagine(SHAPES, [8] * 5, ["full"]))
    assert len(bytes_table(many).rows) == len(seconds_table(many).rows) == 1
    assert str(bytes_table(many).rows[0][0]) == "agent-1, agent-2, agent-3 and 2 more"
    assert text(verdict_lines(many.verdicts)).startswith("agent-1, agent-2, agent-3, agent-4, agent-5: safe")


def test_reasons_that_hold_for_all_are_said_once() -> None:
    shown = " ".join(text(verdict_lines(FOUND.verdicts)).split())
    assert shown.count("no agent hands its key") == 1
    assert shown.index("all agents:") > shown.index("agent-3: unsafe")
    assert shown.count("only the secret order protects") == 2
    alone = " ".join(text(verdict_lines(FOUND.verdicts[:1])).split())
    assert "all agents:" not in alone
    assert "no agent hands its key" in alone
    assert text(verdict_lines([])).strip() == ""


def test_rounding_of_dense_packing_and_own_rates_are_told() -> None:
    participants = [Participant("one", 4, "full", (384,) * 19, rates=Rates(measured=True))]
    found = explain(SHAPES, participants, Terms(packing=Packing.DENSE))
    assert "of its norm" in text(bytes_table(found), 160)
    assert "figures of their own: 1 of 1" in text(seconds_table(found), 160)
    shown = " ".join(text(explanation_tables(found)).split())
    assert "from decryption" not in shown
    assert "off by at most" in shown


def test_a_model_without_modules() -> None:
    shapes = parse_shapes("dense*10")
    shown = text(explanation_tables(explain(shapes, imagine(shapes, [4], ["full"]))))
    assert "0 modules, 10 dense values, basis rows 0" in shown
    assert "dense tensors" in shown
    several = parse_shapes("8x16,64x16")
    assert "basis rows 8 to 16" in text(bytes_table(explain(several, imagine(several, [8, 8], ["full"]))), 160)
