"""What an operator installs for the aggregator can neither decrypt nor train, and the program still starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ABSENT = ["openfhe", "pyope", "torch", "transformers", "peft", "datasets"]

# Runs isolated (-I), so only what the fresh environment holds can be found.
PROBE = """
import importlib, importlib.util, json, sys
found = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is not None]
module = importlib.import_module("services.aggregator.__main__")
print(json.dumps({"found": found, "file": module.__file__, "secret": "shelora.he.secret" in sys.modules}))
"""


def run_uv(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the uv of the development environment without a network: whatever it installs comes from its cache."""
    uv = Path(sys.executable).with_name("uv")
    environment = {name: value for name, value in os.environ.items() if name not in {"VIRTUAL_ENV", "PYTHONPATH"}}
    environment |= {"UV_OFFLINE": "1", "UV_NO_PROGRESS": "1", "UV_PYTHON_DOWNLOADS": "never", "NO_COLOR": "1"}
    return subprocess.run([uv, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)


def install(python: Path, *arguments: str) -> None:
    """Install, or skip when the cache lacks a package (never in CI, where set-up has just filled it)."""
    result = run_uv("pip", "install", "--python", str(python), *arguments)
    if result.returncode == 0:
        return
    not_cached = "network was disabled" in result.stderr or "not found in the cache" in result.stderr
    if not_cached and not os.environ.get("CI"):
        pytest.skip(f"uv's cache lacks a package that `make setup` puts there: {' '.join(result.stderr.split())}")
    pytest.fail(f"uv pip install {' '.join(arguments)} failed:\n{result.stderr}")


@pytest.fixture(scope="module")
def aggregator_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment that holds requirements/aggregator.txt and the project."""
    folder = tmp_path_factory.mktemp("aggregator") / "venv"
    created = run_uv("venv", "--python", sys.executable, str(folder))
    assert created.returncode == 0, created.stderr
    python = folder / "bin" / "python"
    install(python, "--require-hashes", "--requirement", "requirements/aggregator.txt")
    install(python, "--no-deps", str(ROOT))
    return python


def test_aggregator_environment_holds_neither_secret_nor_training_library(
    aggregator_python: Path, tmp_path: Path
) -> None:
    result = subprocess.run(
        [aggregator_python, "-I", "-c", PROBE, *ABSENT], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["found"] == []
    assert answer["secret"] is False
    # Imported from the installed package, not from the source tree.
    assert Path(answer["file"]).is_relative_to(aggregator_python.parents[1])


def test_command_starts_in_its_own_environment(aggregator_python: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [aggregator_python.with_name("shelora-aggregator"), "--help"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "Usage" in result.stdout
