"""The parts of the measurement, each in a folder of its own that is removed afterwards."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Final

from bench.aggregator.agents import Workload
from bench.aggregator.cohorts import Cohort, cohorts
from bench.aggregator.distance import distances
from bench.aggregator.ingest import uploads
from bench.aggregator.sums import sums
from bench.records import Record
from bench.runner import Unit
from services.common.server import WINDOW_BYTES

LARGE: Final = Workload(82)
"""86 MB of ciphertext an agent."""

MEDIUM: Final = Workload(41)
"""43 MB."""

SMALL: Final = Workload(2, hidden=256)
"""128 KiB, so that what an upload costs besides its bytes shows."""

TINY: Final = Workload(1)
"""1 MiB, all of it encrypted: a whole cohort of thousands fits a disk."""

ROUNDS: Final = 15

COHORTS: Final = (
    *(Cohort(agents) for agents in (4, 16, 64, 160)),
    *(Cohort(agents, rounds, places=16) for agents, rounds in ((16, 10), (40, 4), (160, 1))),
)
"""Agents that upload 43 MB each at the same time; then the same uploads in all by ever more agents for few places."""

FLEETS: Final = (
    *(Cohort(agents) for agents in (10, 100, 1000)),
    *(Cohort(agents, places=64) for agents in (100, 1000)),
)
"""Agents of a round whose payloads are small, so that what an agent costs besides its bytes shows."""

ROUND_TRIPS_S: Final = (0.02, 0.1)
"""Within a country; between continents."""

WINDOWS: Final = (WINDOW_BYTES, 4 << 20, 16 << 20)
"""Bytes that an upload may send ahead, the default first."""


def units(folder: Path) -> dict[str, Unit]:
    """All parts by name."""
    return {
        "sums": lambda: sums(folder / "sums"),
        "one": lambda: collected(folder / "one", lambda place: uploads(place, LARGE, 1, ROUNDS)),
        "four": lambda: collected(folder / "four", lambda place: uploads(place, MEDIUM, 4, ROUNDS)),
        "small": lambda: collected(folder / "small", lambda place: uploads(place, SMALL, 1, ROUNDS)),
        "memory": lambda: collected(folder / "memory", lambda place: cohorts(place, MEDIUM, COHORTS)),
        "fleet": lambda: collected(folder / "fleet", lambda place: cohorts(place, TINY, FLEETS)),
        "distance": lambda: collected(
            folder / "distance", lambda place: distances(place, MEDIUM, ROUND_TRIPS_S, WINDOWS)
        ),
    }


def collected(folder: Path, measure: Callable[[Path], AsyncIterator[Record]]) -> Iterator[Record]:
    """The records of an asynchronous part."""

    async def collect() -> list[Record]:
        return [record async for record in measure(folder)]

    folder.mkdir(parents=True)
    try:
        yield from asyncio.run(collect())
    finally:
        shutil.rmtree(folder)
