from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support import postgresql


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    folder = postgresql.binaries()
    if folder is None:
        pytest.skip("PostgreSQL is not installed")
    with postgresql.running_server(folder) as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database: SQLite, and a real PostgreSQL where it is installed."""
    if request.param == "postgresql":
        return str(request.getfixturevalue("server"))
    return f"sqlite:///{tmp_path}/state/test.db"
