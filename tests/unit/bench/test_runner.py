from __future__ import annotations

import json
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from bench.records import Record
from bench.runner import measure


class Counting:
    """Units that count how often they are asked; the second fails once."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.broken = True

    def first(self) -> Iterator[Record]:
        self.calls.append("first")
        yield {"value": 1}
        yield {"value": 2}

    def second(self) -> Iterator[Record]:
        self.calls.append("second")
        yield {"value": 3}
        if self.broken:
            raise RuntimeError("interrupted")


@pytest.fixture
def console() -> Console:
    return Console(file=StringIO())


def test_an_interrupted_measurement_goes_on_where_it_was(tmp_path: Path, console: Console) -> None:
    units = Counting()
    parts = {"first": units.first, "second": units.second}
    with pytest.raises(RuntimeError, match="interrupted"):
        measure("speed", parts, tmp_path, stamp={"version": "a"}, fresh=False, console=console)
    units.broken = False
    result = measure("speed", parts, tmp_path, stamp={"version": "a"}, fresh=False, console=console)
    assert units.calls == ["first", "second", "second"]
    assert result["records"] == {"first": [{"value": 1}, {"value": 2}], "second": [{"value": 3}]}
    assert json.loads((tmp_path / "speed.json").read_text()) == result


@pytest.mark.parametrize(("version", "fresh"), [("b", False), ("a", True)])
def test_other_code_or_a_fresh_run_measures_again(tmp_path: Path, console: Console, version: str, fresh: bool) -> None:
    units = Counting()
    measure("speed", {"first": units.first}, tmp_path, stamp={"version": "a"}, fresh=False, console=console)
    measure("speed", {"first": units.first}, tmp_path, stamp={"version": version}, fresh=fresh, console=console)
    assert units.calls == ["first", "first"]
