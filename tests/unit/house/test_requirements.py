"""The locked requirements: hashed, free of index addresses, consistent with pyproject.toml and with each other."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import files
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[3]
ROLES = ("aggregator", "keymanager", "agent", "dev")
FILES = (*ROLES, "bootstrap")
TRAINING = {"torch", "transformers", "peft", "datasets", "accelerate", "sentence-transformers"}
SECRET = {"openfhe", "pyope"}
NAMED_BY_URL = {"asyncpg"}
"""SQLAlchemy imports its driver by the database's URL."""


@dataclass(frozen=True)
class Pin:
    """One locked package: its requirement and the hashes that an installer accepts."""

    requirement: Requirement
    hashes: frozenset[str]

    @property
    def name(self) -> str:
        return canonicalize_name(self.requirement.name)

    @property
    def version(self) -> str:
        (specifier,) = self.requirement.specifier
        return specifier.version


def parse_pins(text: str) -> list[Pin]:
    """Read a locked requirements file; anything but a hashed `==` pin is an error."""
    pins = []
    for line in text.replace("\\\n", " ").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        requirement_text, *hash_options = re.split(r"\s+--hash=", line.strip())
        requirement = Requirement(requirement_text)
        operators = [specifier.operator for specifier in requirement.specifier]
        if operators != ["=="]:
            raise ValueError(f"not pinned: {line[:80]}")
        if not hash_options or not all(re.fullmatch(r"sha256:[0-9a-f]{64}", option) for option in hash_options):
            raise ValueError(f"not hashed: {line[:80]}")
        pins.append(Pin(requirement, frozenset(hash_options)))
    return pins


def read_pins(name: str) -> list[Pin]:
    return parse_pins((ROOT / "requirements" / f"{name}.txt").read_text())


def project() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table


def requirements_of(extra: str) -> Iterator[Requirement]:
    """Everything that an extra asks for by name, the extras it is made of included."""
    for text in project()["optional-dependencies"][extra]:
        requirement = Requirement(text)
        if requirement.name == "shelora":
            for inner in sorted(requirement.extras):
                yield from requirements_of(inner)
        else:
            yield requirement


@pytest.mark.parametrize(
    "line",
    [
        "numpy==2.2.6",
        "numpy>=2.2.6 --hash=sha256:" + "0" * 64,
        "numpy==2.2.6 --hash=md5:" + "0" * 32,
        "--index-url=https://packages.example/simple",
        "https://packages.example/numpy-2.2.6-py3-none-any.whl",
    ],
)
def test_parse_pins_refuses_what_is_not_a_hashed_pin(line: str) -> None:
    with pytest.raises(ValueError, match=r"not hashed|not pinned|Expected"):
        parse_pins(line + "\n")


def test_requirements_folder_holds_the_known_files_only() -> None:
    assert sorted(path.name for path in (ROOT / "requirements").iterdir()) == sorted(f"{name}.txt" for name in FILES)


@pytest.mark.parametrize("name", FILES)
def test_every_line_is_a_hashed_pin(name: str) -> None:
    assert read_pins(name)


@pytest.mark.parametrize("name", FILES)
def test_no_file_names_an_index(name: str) -> None:
    text = (ROOT / "requirements" / f"{name}.txt").read_text()
    assert "://" not in text
    assert not re.search(r"^\s*(-i|-f|--index-url|--extra-index-url|--find-links|--trusted-host)\b", text, re.MULTILINE)


def test_aggregator_has_no_secret_and_no_training_library() -> None:
    assert {pin.name for pin in read_pins("aggregator")} & (SECRET | TRAINING) == set()


def test_keymanager_has_openfhe_and_no_training_library() -> None:
    names = {pin.name for pin in read_pins("keymanager")}
    assert "openfhe" in names
    assert names & TRAINING == set()


def test_agent_has_openfhe_and_the_training_libraries() -> None:
    assert {pin.name for pin in read_pins("agent")} >= SECRET | TRAINING


@pytest.mark.parametrize("name", ["keymanager", "agent", "dev"])
@pytest.mark.parametrize(("python", "version"), [("3.10", "1.6.1.0.22.4"), ("3.11", None), ("3.12", "1.6.1.0.24.4")])
def test_openfhe_binary_matches_the_interpreter(name: str, python: str, version: str | None) -> None:
    environment = {"python_version": python, "python_full_version": f"{python}.1"}
    chosen = [
        pin.version
        for pin in read_pins(name)
        if pin.name == "openfhe" and pin.requirement.marker and pin.requirement.marker.evaluate(environment)
    ]
    assert chosen == ([version] if version else [])


@pytest.mark.parametrize("role", ROLES)
def test_lock_satisfies_the_extra_it_was_made_from(role: str) -> None:
    pins = read_pins(role)
    wanted = [*map(Requirement, project()["dependencies"]), *requirements_of(role)]
    unmet = [
        str(requirement)
        for requirement in wanted
        if not any(
            pin.name == canonicalize_name(requirement.name) and requirement.specifier.contains(pin.version)
            for pin in pins
        )
    ]
    assert unmet == []


@pytest.fixture(scope="module")
def imported() -> set[str]:
    """First parts of the names of everything that product code imports."""
    names = set()
    for path in (*(ROOT / "shelora").rglob("*.py"), *(ROOT / "services").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("role", [role for role in ROLES if role != "dev"])
def test_product_code_imports_every_library_that_it_asks_for(role: str, imported: set[str]) -> None:
    asked = {found.name for found in requirements_of(role) if found.marker is None or found.marker.evaluate()}
    modules = {name: {path.parts[0].split(".")[0] for path in files(name) or ()} for name in asked - NAMED_BY_URL}
    assert [name for name, found in modules.items() if not found & imported] == []


@pytest.mark.parametrize("name", [name for name in FILES if name != "dev"])
def test_every_file_pins_what_the_development_lock_pins(name: str) -> None:
    development = {(pin.name, pin.version): pin.hashes for pin in read_pins("dev")}
    for pin in read_pins(name):
        assert development[pin.name, pin.version] == pin.hashes
