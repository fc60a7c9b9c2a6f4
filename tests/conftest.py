"""What every test starts from: no network, one event loop, reproducible property tests."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Iterator

# Before anything imports the libraries that read them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import structlog
from hypothesis import HealthCheck, settings

# Several test processes share few cores: how long an example takes says nothing about the code.
_UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("dev", _UNHURRIED, max_examples=50)
settings.register_profile("ci", _UNHURRIED, max_examples=50, derandomize=True, print_blob=True)
settings.register_profile("thorough", _UNHURRIED, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Run every async test on asyncio: grpc.aio knows no other loop."""
    return "asyncio"


@pytest.fixture(scope="session", autouse=True)
async def one_event_loop(anyio_backend: str) -> AsyncIterator[None]:
    """Keep one loop for the session: grpc.aio has one poller a process, whose late events fail in any newer loop."""
    yield  # noqa: PT022 - only a generator keeps the loop


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """Undo what a test configures of the process's logs: a command run in here leaves a handler on a closed stream."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    root.handlers, root.level = handlers, level
    structlog.reset_defaults()
