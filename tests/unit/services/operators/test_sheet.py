from __future__ import annotations

import io

import pytest
from rich.console import Console

from services.operators.sheet import Sheet


def lines(sheet: Sheet, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO())
    with console.capture() as capture:
        console.print(sheet)
    return [line.rstrip() for line in capture.get().splitlines()]


def wide() -> Sheet:
    sheet = Sheet("agent", *(f"figure {index}>" for index in range(8)), "remark", title="what was measured")
    for name in ("agent-1", "agent-2"):
        sheet.add(name, *(f"{index}23.45" for index in range(8)), "a long remark in many words")
    return sheet


def test_a_wide_terminal_gets_one_table() -> None:
    shown = lines(wide(), 200)
    assert shown[0] == "what was measured"
    assert sum("agent" in line for line in shown) == 3


@pytest.mark.parametrize("width", [40, 60, 80])
def test_a_narrow_terminal_gets_several_and_no_figure_is_broken(width: int) -> None:
    shown = lines(wide(), width)
    assert sum(line.count("agent-1") for line in shown) > 1
    for index in range(8):
        assert sum(f"{index}23.45" in line for line in shown) == 2
    assert max(map(len, shown)) <= width


def test_nothing_is_markup() -> None:
    sheet = Sheet("[bold]name")
    sheet.add("[red]x[/red]")
    shown = "".join(lines(sheet, 80))
    assert "[bold]name" in shown
    assert "[red]x[/red]" in shown


def test_empty_and_uneven() -> None:
    assert any("name" in line for line in lines(Sheet("name", "count>"), 80))
    with pytest.raises(ValueError, match="expected 2 cells, got 1"):
        Sheet("name", "count>").add("x")
