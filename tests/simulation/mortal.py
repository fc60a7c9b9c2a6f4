"""A process that can die at any line.

What leaves a trace asks `Fate` afterwards. That is enough: dying before a write, or around a read, leaves the same disk
as dying after the write before it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from services.aggregator.compute import LocalCompute
from services.aggregator.domain import BasisResult, CohortMember
from services.common.blobs import Blob, DirectoryBlobStore
from services.common.database import Database
from services.common.digests import Buffer
from services.common.staging import DirectoryStaging
from shelora.he.parameters import CkksParameters
from shelora.plan import Plan

Result = TypeVar("Result")

READS = {
    "admit_upload",
    "find_inputs",
    "find_unswept",
    "list_agents",
    "list_federations",
    "open_download",
    "present_keys",
    "read_events",
    "read_federation",
    "summarise_federation",
    "summarise_round",
}
"""Transactions that change nothing."""


class Killed(BaseException):
    """What kill -9 looks like from inside: no handler for errors runs."""


class Fate:
    """Counts the lines at which the process may die.

    Attributes:
        steps: lines passed so far.
        dies_at: the line at which it dies, None for never.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.dies_at: int | None = None

    @property
    def dead(self) -> bool:
        return self.dies_at is not None and self.steps >= self.dies_at

    def die_in(self, steps: int) -> None:
        self.dies_at = self.steps + steps

    def require_life(self) -> None:
        if self.dead:
            raise Killed

    def pass_line(self) -> None:
        if not self.dead:
            self.steps += 1
        self.require_life()


class MortalDatabase(Database):
    def __init__(self, url: str, fate: Fate) -> None:
        super().__init__(url)
        self._fate = fate

    async def run_tx(self, name: str, body: Callable[[Any], Awaitable[Result]]) -> Result:
        self._fate.require_life()
        result = await super().run_tx(name, body)
        if name not in READS:
            self._fate.pass_line()
        return result


class MortalStaging:
    """A staging whose every write may be the last thing the process does."""

    def __init__(self, staging: DirectoryStaging, fate: Fate) -> None:
        self._staging = staging
        self._fate = fate

    @property
    def path(self) -> Path:
        return self._staging.path

    @property
    def size_bytes(self) -> int:
        return self._staging.size_bytes

    def append(self, offset: int, data: Buffer) -> None:
        self._fate.require_life()
        self._staging.append(offset, data)
        self._fate.pass_line()

    def sync(self) -> None:
        self._fate.require_life()
        self._staging.sync()
        self._fate.pass_line()

    async def verify(self, expected_size: int, expected_digest: bytes) -> None:
        self._fate.require_life()
        await self._staging.verify(expected_size, expected_digest)
        self._fate.pass_line()

    async def commit(self, key: str, expected_size: int, expected_digest: bytes) -> Blob:
        self._fate.require_life()
        blob = await self._staging.commit(key, expected_size, expected_digest)
        self._fate.pass_line()
        return blob

    def discard(self) -> None:
        self._fate.require_life()
        self._staging.discard()
        self._fate.pass_line()


class MortalBlobs(DirectoryBlobStore):
    """Deletions and stagings that may be the last thing the process does."""

    def __init__(self, root: Path, fate: Fate) -> None:
        super().__init__(root)
        self._fate = fate

    def staging(self, upload_id: str, size_bytes: int = 0) -> MortalStaging:  # type: ignore[override]  # the protocol is what counts
        return MortalStaging(super().staging(upload_id, size_bytes), self._fate)

    def delete(self, key: str) -> None:
        self._fate.require_life()
        super().delete(key)
        self._fate.pass_line()

    def discard_stagings(self, prefix: str) -> int:
        self._fate.require_life()
        count = super().discard_stagings(prefix)
        if count:
            self._fate.pass_line()
        return count


class MortalCompute:
    """The real computations, with a chance to die before and after each."""

    def __init__(self, compute: LocalCompute, fate: Fate) -> None:
        self._compute = compute
        self._fate = fate

    async def compute_basis(self, plan: Plan, members: Sequence[CohortMember], prefix: str) -> BasisResult:
        return await self._mortally(self._compute.compute_basis(plan, members, prefix))

    async def fold_residues(
        self, total: Blob | None, terms: Sequence[Blob], blocks: int, parameters: CkksParameters, key: str
    ) -> Blob:
        return await self._mortally(self._compute.fold_residues(total, terms, blocks, parameters, key))

    async def compute_average(self, plan: Plan, basis: Blob, members: Sequence[CohortMember], key: str) -> Blob:
        return await self._mortally(self._compute.compute_average(plan, basis, members, key))

    async def rank_votes(self, plan: Plan, votes: Sequence[Blob], columns: Sequence[int], key: str) -> Blob:
        return await self._mortally(self._compute.rank_votes(plan, votes, columns, key))

    async def _mortally(self, work: Awaitable[Result]) -> Result:
        result = await work
        self._fate.pass_line()
        return result
