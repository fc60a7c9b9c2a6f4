"""The aggregator's computations on this machine: basis and projections, plain averages, residue sums, vote rankings.

Every step handles one module (or one range of blocks) from files to files, and as many steps run at once as there are
threads, so memory is bounded by the largest modules and not by the model, the cohort or the payloads; a step ends
quickly, so that a shutdown never waits long. Inputs stay as they are and a result appears whole or not at all: doing a
computation again after a crash counts nothing twice.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from services.aggregator.domain import BasisResult, CohortMember
from services.aggregator.payload_tensors import (
    average_specs,
    basis_specs,
    factors_specs,
    projection_specs,
    range_specs,
    rows_specs,
    votes_specs,
)
from services.aggregator.residue_sums import STRETCH_BYTES, Summand, check_lengths, sum_stretch
from services.aggregator.tensors import (
    INT64,
    TensorSpec,
    locate,
    read_tensor,
    stored_shapes,
    write_header,
    write_tensor,
)
from services.common.blobs import Blob, BlobStore
from services.common.threads import WorkerPool, spread
from shelora.errors import InternalFault, MalformedInput, StoredBytesCorrupt, UnknownBlob
from shelora.he.parameters import CkksParameters
from shelora.lora import BasisSketch, basis, plain_part, project
from shelora.plan.packing import Packing, agree_ranges
from shelora.plan.plan import Plan

Result = TypeVar("Result")

BATCH_VALUES: Final = 1 << 20
"""Left factors of a module with at most this many values side by side are decomposed at once, more are sketched."""

GRAIN: Final = 1 << 21
"""Products of two matrices with fewer multiplications are made by one thread: several would rather wait for each other
at the interpreter's lock."""


@dataclass(frozen=True)
class TensorSource:
    """A stored tensor file whose tensors have been found.

    Attributes:
        path: the file.
        specs: its tensors.
        offsets: int64[len(specs)], where each begins.
    """

    path: Path
    specs: tuple[TensorSpec, ...]
    offsets: NDArray[np.int64]

    @classmethod
    def of(cls, path: Path, specs: Sequence[TensorSpec]) -> TensorSource:
        """Find the tensors of a stored file.

        Raises:
            StoredBytesCorrupt: the file holds something else.
        """
        try:
            return cls(path, tuple(specs), locate(path, specs))
        except MalformedInput as error:
            raise StoredBytesCorrupt(
                f"stored tensors {path.name}: {error.message}",
                hint="check the disk and restore the state folder from a backup",
            ) from error

    def read(self, index: int) -> NDArray[Any]:
        """The tensor at `index` of `specs`, whole."""
        with self.path.open("rb") as file:
            return read_tensor(file, self.specs[index], int(self.offsets[index]))


class LocalCompute:
    """Computes with threads of this process; the Compute of the service.

    Args:
        blobs: where inputs are and results go.
        pool: threads for the work.
        batch_values: see BATCH_VALUES.
    """

    def __init__(self, blobs: BlobStore, pool: WorkerPool, batch_values: int = BATCH_VALUES) -> None:
        self._blobs = blobs
        self._pool = pool
        self._batch_values = batch_values

    async def compute_basis(self, plan: Plan, members: Sequence[CohortMember], prefix: str) -> BasisResult:
        """Common basis of all members' left factors, and each member's projection onto it.

        Raises:
            UnknownBlob, StoredBytesCorrupt: a member's factors are missing or damaged.
        """
        factors = [await self._factors(plan, member) for member in members]
        specs = basis_specs(plan, [member.rank for member in members])
        weights = [member.weight for member in members]
        with self._blobs.writer(f"{prefix}/basis.safetensors") as writer:
            write_header(writer.file, specs)
            bases = (functools.partial(self._basis, plan, index, weights, factors) for index in range(len(specs)))
            await self._in_order(bases, functools.partial(_write_next, writer.file, iter(specs)))
            stored = await self._pool.run(writer.commit)
        source = await self._pool.run(TensorSource.of, self._blobs.path(stored.key), specs)
        product = max(member.rank for member in members) * max((spec.values for spec in specs), default=0)
        ranges = await self._spread(
            (
                functools.partial(_agree_ranges, source, index, factors, weights)
                for index in (range(len(specs)) if plan.packing is Packing.DENSE else ())
            ),
            product,
        )
        blobs = await self._spread(
            (
                functools.partial(
                    self._project,
                    f"{prefix}/projection-{member.agent}.safetensors",
                    plan,
                    source,
                    own,
                    member.rank,
                    ranges,
                )
                for member, own in zip(members, factors, strict=True)
            ),
            product,
        )
        projections = {member.agent: blob for member, blob in zip(members, blobs, strict=True)}
        return BasisResult(stored, projections)

    async def fold_residues(
        self, total: Blob | None, terms: Sequence[Blob], blocks: int, parameters: CkksParameters, key: str
    ) -> Blob:
        """New blob of exactly `blocks` ciphertext blocks: `total` plus all terms, modulo q.

        Raises:
            SizeMismatch: a summand does not fit.
            UnknownBlob, StoredBytesCorrupt: a summand is missing or damaged.
        """
        check_lengths(total, terms, blocks, parameters)
        present = [*([] if total is None else [total]), *terms]
        summands = await self._spread(functools.partial(self._summand, blob) for blob in present)
        size = blocks * parameters.block_bytes
        with self._blobs.writer(key, size) as writer:
            stretches = (
                functools.partial(sum_stretch, summands, start, min(STRETCH_BYTES, size - start), parameters.modulus)
                for start in range(0, size, STRETCH_BYTES)
            )
            # Hashing overlaps with adding.
            await self._in_order(stretches, writer.extend)
            for summand in summands:
                summand.finish()
            return await self._pool.run(writer.commit)

    async def compute_average(self, plan: Plan, basis: Blob, members: Sequence[CohortMember], key: str) -> Blob:
        """Published average of the members: basis and weighted sum of their plain columns.

        Raises:
            UnknownBlob, StoredBytesCorrupt: an input is missing or damaged.
        """
        await self._blobs.verify(basis)
        factors = [await self._factors(plan, member) for member in members]
        basis_path = self._blobs.path(basis.key)
        rows = await self._pool.run(_stored_rows, basis_path, plan)
        basis_source = TensorSource.of(basis_path, rows_specs(plan, rows))
        projections = [await self._projection(plan, member, rows) for member in members]
        specs = average_specs(plan, rows, [member.columns for member in members])
        ranges = range_specs(plan, rows)
        weights = [member.weight for member in members]
        with self._blobs.writer(key) as writer:
            write_header(writer.file, [*specs, *ranges])
            averages = (
                functools.partial(
                    _average, index, specs[2 * index + 1].shape, basis_source, weights, factors, projections
                )
                for index in range(len(rows))
            )
            product = max(member.rank for member in members) * max((spec.values for spec in specs[1::2]), default=0)
            await self._in_order(averages, functools.partial(_write_next, writer.file, iter(specs)), product)
            for index, spec in enumerate(ranges):
                # All members were answered the same ranges.
                write_tensor(writer.file, spec, projections[0].read(len(rows) + index))
            return await self._pool.run(writer.commit)

    async def rank_votes(self, plan: Plan, votes: Sequence[Blob], columns: Sequence[int], key: str) -> Blob:
        """Ranked tokens per module, at most as many as voted for.

        Raises:
            UnknownBlob, StoredBytesCorrupt: votes are missing or damaged.
        """
        specs = votes_specs(plan, columns)
        sources = [await self._source(blob, specs) for blob in votes]
        rankings = await self._spread(
            functools.partial(_rank_module, index, module.in_features, columns[index], sources)
            for index, module in enumerate(plan.shapes.modules)
        )
        with self._blobs.writer(key) as writer:
            results = [
                TensorSpec(f"{index}.token", INT64, ranking.shape, module.name)
                for index, (module, ranking) in enumerate(zip(plan.shapes.modules, rankings, strict=True))
            ]
            write_header(writer.file, results)
            for spec, ranking in zip(results, rankings, strict=True):
                write_tensor(writer.file, spec, ranking)
            return await self._pool.run(writer.commit)

    async def _spread(self, steps: Iterable[Callable[[], Result]], product: int = GRAIN) -> list[Result]:
        """Run independent steps, on all threads of the pool if they multiply matrices that are worth it."""
        return await spread((functools.partial(self._pool.run, step) for step in steps), self._threads_for(product))

    async def _in_order(
        self, steps: Iterable[Callable[[], Result]], write: Callable[[Result], None], product: int = GRAIN
    ) -> None:
        """The same, and each result is written after the one before it."""
        results = _InOrder(self._pool, write)
        threads = self._threads_for(product)
        # One more than threads: while it waits for the disk, the others compute.
        calls = (functools.partial(results.add, *step) for step in enumerate(steps))
        await spread(calls, threads + 1 if threads > 1 else 1)

    def _threads_for(self, product: int) -> int:
        return self._pool.threads if product >= GRAIN else 1

    def _summand(self, blob: Blob) -> Summand:
        return Summand(blob, _existing(self._blobs, blob), self._blobs.seal(blob))

    async def _source(self, blob: Blob, specs: Sequence[TensorSpec]) -> TensorSource:
        await self._blobs.verify(blob)
        return await self._pool.run(TensorSource.of, self._blobs.path(blob.key), specs)

    async def _factors(self, plan: Plan, member: CohortMember) -> TensorSource:
        if member.factors is None:
            raise UnknownBlob(f"factors of {member.agent}: expected stored bytes, got none")
        return await self._source(member.factors, factors_specs(plan, member.rank, member.columns))

    async def _projection(self, plan: Plan, member: CohortMember, rows: Sequence[int]) -> TensorSource:
        if member.projection is None:
            raise UnknownBlob(f"projection of {member.agent}: expected stored bytes, got none")
        specs = [*projection_specs(plan, member.rank, rows), *range_specs(plan, rows)]
        return await self._source(member.projection, specs)

    def _basis(
        self, plan: Plan, index: int, weights: Sequence[float], factors: Sequence[TensorSource]
    ) -> tuple[NDArray[Any], ...]:
        """Directions of one module."""
        module = plan.shapes.modules[index]
        columns = sum(source.specs[2 * index].shape[1] for source in factors)
        batch = module.out_features * columns <= self._batch_values
        lefts = (source.read(2 * index) for source in factors)
        try:
            if batch:
                return (basis(list(lefts), weights, plan.cap),)
            return (_sketched(module.out_features, plan.cap, lefts, weights),)
        except np.linalg.LinAlgError as error:
            raise InternalFault(
                f"basis of {module.name}: expected the decomposition to converge, it did not",
                hint="look for unusual values in the agents' figures of this round",
                context={"module": module.name},
            ) from error

    def _project(
        self,
        key: str,
        plan: Plan,
        basis_source: TensorSource,
        factors: TensorSource,
        rank: int,
        ranges: Sequence[NDArray[np.float64]],
    ) -> Blob:
        """Write one member's projections, and the ranges that dense packing needs."""
        rows = [spec.shape[1] for spec in basis_source.specs]
        specs, of_ranges = projection_specs(plan, rank, rows), range_specs(plan, rows)
        with self._blobs.writer(key) as writer:
            write_header(writer.file, [*specs, *of_ranges])
            for index, spec in enumerate(specs):
                write_tensor(writer.file, spec, _projection(basis_source, factors, index))
            for spec, values in zip(of_ranges, ranges, strict=True):
                write_tensor(writer.file, spec, values)
            return writer.commit()


class _InOrder(Generic[Result]):
    """Writes results of concurrent steps from front to back.

    A step ends when its result is written, so there are never more results than steps at once.
    """

    def __init__(self, pool: WorkerPool, write: Callable[[Result], None]) -> None:
        self._pool = pool
        self._write = write
        self._next = 0
        self._failed = False
        self._turn = asyncio.Condition()

    async def add(self, index: int, step: Callable[[], Result]) -> None:
        """Run a step and write its result as soon as those before are written; dropped if one of them failed."""
        try:
            await self._put(index, await self._pool.run(step))
        except BaseException:
            self._failed = True
            async with self._turn:
                self._turn.notify_all()
            raise

    async def _put(self, index: int, result: Result) -> None:
        async with self._turn:
            await self._turn.wait_for(lambda: self._next == index or self._failed)
            if not self._failed:
                await self._pool.run(self._write, result)
                self._next += 1
                self._turn.notify_all()


def _write_next(file: BinaryIO, specs: Iterator[TensorSpec], tensors: Iterable[NDArray[Any]]) -> None:
    """Append tensors under the next names of a header."""
    for values in tensors:
        write_tensor(file, next(specs), values)


def _projection(basis_source: TensorSource, factors: TensorSource, index: int) -> NDArray[np.float32]:
    """One member's projection of one module, as it travels: basis as published and result in float32."""
    return project(basis_source.read(index), factors.read(2 * index)).astype(np.float32)


def _agree_ranges(
    basis_source: TensorSource, index: int, factors: Sequence[TensorSource], weights: Sequence[float]
) -> NDArray[np.float64]:
    return agree_ranges((_projection(basis_source, source, index) for source in factors), weights)


def _sketched(rows: int, cap: int, lefts: Iterable[NDArray[Any]], weights: Sequence[float]) -> NDArray[np.float64]:
    sketch = BasisSketch(rows, cap)
    for left, weight in zip(lefts, weights, strict=True):
        sketch.add(left, weight)
    return sketch.basis()


def _existing(blobs: BlobStore, blob: Blob) -> Path:
    path = blobs.path(blob.key)
    if not path.is_file():
        raise UnknownBlob(f"blob: expected {blob.key}, got nothing under this key")
    return path


def _stored_rows(path: Path, plan: Plan) -> list[int]:
    """Basis rows s per module as the basis file has them: the cohort it was made for may have been larger."""
    shapes = stored_shapes(path, len(plan.shapes.modules))
    return [shapes[f"{index}.basis"][-1] for index in range(len(plan.shapes.modules))]


def _average(
    index: int,
    shape: tuple[int, ...],
    basis_source: TensorSource,
    weights: Sequence[float],
    factors: Sequence[TensorSource],
    projections: Sequence[TensorSource],
) -> tuple[NDArray[Any], ...]:
    """Basis and sum of the plain columns of one module."""
    total = np.zeros(shape)
    for weight, left_right, projection in zip(weights, factors, projections, strict=True):
        right = left_right.read(2 * index + 1)
        total += plain_part(projection.read(index), right, weight, shape[1])
    return basis_source.read(index), total


def _rank_module(index: int, width: int, limit: int, sources: Sequence[TensorSource]) -> NDArray[np.int64]:
    """Tokens of one module by how many agents named them, then by highest score, then by token.

    The rule is `shelora.plan.rank_tokens`, here on whole arrays: a large cohort casts millions of votes.
    """
    named = np.zeros(width, dtype=np.int64)
    highest = np.zeros(width, dtype=np.int64)
    for source in sources:
        tokens, scores = source.read(2 * index), source.read(2 * index + 1)
        named[tokens] += 1
        np.maximum.at(highest, tokens, scores)
    order: NDArray[np.int64] = np.lexsort((np.arange(width), -highest, -named)).astype(np.int64)
    return order[: min(limit, int(np.count_nonzero(named)))]
