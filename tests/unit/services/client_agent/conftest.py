from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from support.memory_federation import MemoryFederation, MemoryKeyManager
from support.ward import Ward


@pytest.fixture(scope="module")
def keymanager() -> MemoryKeyManager:
    return MemoryKeyManager(epochs=2)


@pytest.fixture
async def ward(keymanager: MemoryKeyManager, tmp_path: Path) -> AsyncIterator[Ward]:
    keymanager.away = False
    ward = Ward(tmp_path, MemoryFederation(keymanager, agents=3))
    yield ward
    for name in ward.lives:
        await ward.kill(name)
