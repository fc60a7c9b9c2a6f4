"""The console scripts of pyproject.toml name code that exists."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SCRIPTS: dict[str, str] = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"][
    "scripts"
]


def test_one_program_a_role() -> None:
    assert sorted(SCRIPTS) == ["shelora", "shelora-agent", "shelora-aggregator", "shelora-keymanager"]


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_entry_point_is_callable(script: str) -> None:
    module, _, attribute = SCRIPTS[script].partition(":")
    assert callable(getattr(import_module(module), attribute))
