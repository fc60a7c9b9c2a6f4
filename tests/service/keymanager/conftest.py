from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from support.keymanager import Running, serving_keymanager


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    """A key manager that serves on loopback with TLS."""
    async with serving_keymanager(tmp_path) as found:
        yield found
