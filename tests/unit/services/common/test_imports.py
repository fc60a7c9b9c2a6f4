from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import services.common

MODULES = sorted(path.stem for path in Path(services.common.__path__[0]).glob("*.py") if path.stem != "__init__")
STATEFUL = {"database", "ops", "sqlite"}
PROGRAM = """
import importlib, sys
for name in sys.argv[1].split(","):
    importlib.import_module(f"services.common.{name}")
print(*sorted(set(sys.argv[2].split(",")) & set(sys.modules)))
"""


def loaded(modules: list[str], suspects: str) -> list[str]:
    """Which of the suspects a fresh interpreter has loaded after importing the modules."""
    command = [sys.executable, "-c", PROGRAM, ",".join(modules), suspects]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=100).stdout.split()


@pytest.mark.parametrize("suspects", ["openfhe,torch,transformers,peft,datasets,pyope,shelora.he.secret"])
def test_the_common_part_loads_no_encryption_or_training_library(suspects: str) -> None:
    assert loaded(MODULES, suspects) == []


def test_agents_need_no_database_or_web_framework() -> None:
    modules = [name for name in MODULES if name not in STATEFUL]
    assert set(MODULES) > STATEFUL
    assert loaded(modules, "sqlalchemy,alembic,fastapi,uvicorn") == []
