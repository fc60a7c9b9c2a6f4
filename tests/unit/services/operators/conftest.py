from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import structlog

from services.operators.domain import Federation, Round
from support.operators import make_federation, make_round


@pytest.fixture(autouse=True)
def restored_logs() -> Iterator[None]:
    """Commands point the logs at the standard error of their moment; put back what was there."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers, root.level = handlers, level
    structlog.reset_defaults()


@pytest.fixture
def federation() -> Federation:
    return make_federation()


@pytest.fixture
def published_round() -> Round:
    return make_round(1)


@pytest.fixture
def no_profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Mapping[str, str]:
    monkeypatch.delenv("SHELORA_PROFILE", raising=False)
    monkeypatch.chdir(tmp_path)
    return {}
