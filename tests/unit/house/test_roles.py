"""What each role installs is what its code can reach, so that no service needs a package only the developers have."""

from __future__ import annotations

import re
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[3]
PRODUCT = {"shelora", "services"}


@cache
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("shelora", "services", include_external_packages=True, cache_dir=None)


def reachable_packages(module: str) -> set[str]:
    """Third-party import packages that a module reaches, over any number of our own modules, lazy imports included."""
    upstream = graph().find_upstream_modules(module, as_package=True)
    names = {name.partition(".")[0] for name in upstream if graph().is_module_squashed(name)}
    return names - PRODUCT - set(sys.stdlib_module_names)


@cache
def packages_of(distribution: str) -> frozenset[str]:
    """Import packages that an installed distribution brings; none when the lock has it for another Python only."""
    try:
        contents = files(distribution) or []
    except PackageNotFoundError:
        return frozenset()
    return frozenset(path.parts[0].partition(".")[0] for path in contents)


def locked_packages(role: str) -> set[str]:
    text = (ROOT / "requirements" / f"{role}.txt").read_text()
    names = re.findall(r"^([A-Za-z0-9._-]+)==", text, re.MULTILINE)
    return set().union(*map(packages_of, names))


# Parquet is read where pyarrow is there; where it is not, the reader says so and what to do.
OPTIONAL = {"services.operators": {"pyarrow"}}


# The operators' commands come with every image of a service; the aggregator's is the one they are run from.
@pytest.mark.parametrize(
    ("module", "role"),
    [
        ("services.keymanager", "keymanager"),
        ("services.aggregator", "aggregator"),
        ("services.client_agent", "agent"),
        ("services.operators", "aggregator"),
    ],
)
def test_role_installs_everything_its_code_reaches(module: str, role: str) -> None:
    assert reachable_packages(module) - locked_packages(role) - OPTIONAL.get(module, set()) == set()


def test_reachable_packages_follows_our_own_modules() -> None:
    assert "openfhe" in reachable_packages("shelora.he.secret")
    assert "numpy" in reachable_packages("shelora")
    assert "openfhe" not in reachable_packages("shelora.lora")
