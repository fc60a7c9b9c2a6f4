from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from support.deployment import Deployment, deployed


@pytest.fixture
async def deployment(tmp_path: Path) -> AsyncIterator[Deployment]:
    async with deployed(tmp_path) as found:
        yield found
