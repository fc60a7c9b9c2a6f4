from __future__ import annotations

import pytest

from services.common.blobs import DirectoryBlobStore
from services.common.threads import WorkerPool


@pytest.fixture
def blobs(tmp_path):
    return DirectoryBlobStore(tmp_path / "blobs")


@pytest.fixture
def pool():
    return WorkerPool(2)
