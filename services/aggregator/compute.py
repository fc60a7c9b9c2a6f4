"""The aggregator's computations on this machine: basis and projections, plain averages, residue sums, vote rankings.

Every step handles one module (or one range of blocks) from files to files, so memory is bounded by the largest module
and not by the model, the cohort or the payloads; a step ends quickly, so that a shutdown never waits long. Inputs stay
as they are and a result appears whole or not at all: doing a computation again after a crash counts nothing twice.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from services.aggregator.domain import BasisResult, CohortMember
from services.aggregator.payloads import factors_specs, votes_specs
from services.aggregator.residue_sums import STRETCH_BYTES, Summand, check_lengths, sum_stretch
from services.aggregator.tensors import (
    FLOAT32,
    INT64,
    TensorSpec,
    locate,
    read_tensor,
    stored_shapes,
    write_header,
    write_tensor,
)
from services.common.blobs import Blob, BlobStore, BlobWriter
from services.common.threads import WorkerPool, spread
from shelora.errors import InternalFault, MalformedInput, StoredBytesCorrupt, UnknownBlob
from shelora.he.parameters import CkksParameters
from shelora.lora import BasisSketch, basis, basis_rows, plain_part, project
from shelora.plan.packing import Packing, agree_ranges
from shelora.plan.plan import Plan

Result = TypeVar("Result")

BATCH_VALUES: Final = 1 << 20
"""Left factors of a module with at most this many values side by side are decomposed at once, more are sketched."""


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
        specs = _basis_specs(plan, [member.rank for member in members])
        with self._blobs.writer(f"{prefix}/basis.safetensors") as writer:
            write_header(writer.file, specs)
            for index, spec in enumerate(specs):
                await self._pool.run(self._write_basis, writer.file, plan, index, spec, members, factors)
            stored = await self._pool.run(writer.commit)
        source = await self._pool.run(TensorSource.of, self._blobs.path(stored.key), specs)
        weights = [member.weight for member in members]
        ranges = [
            await self._pool.run(_agree_ranges, source, index, factors, weights)
            for index in (range(len(specs)) if plan.packing is Packing.DENSE else ())
        ]
        projections = {}
        for member, member_factors in zip(members, factors, strict=True):
            key = f"{prefix}/projection-{member.agent}.safetensors"
            projections[member.agent] = await self._pool.run(
                self._project, key, plan, source, member_factors, member.rank, ranges
            )
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
            results = _InOrder(self._pool, writer)

            async def stretch(start: int) -> None:
                length = min(STRETCH_BYTES, size - start)
                total = await self._pool.run(sum_stretch, summands, start, length, parameters.modulus)
                await results.append(start, total)

            starts = range(0, size, STRETCH_BYTES)
            await spread((functools.partial(stretch, start) for start in starts), self._pool.threads)
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
        basis_source = TensorSource.of(basis_path, _rows_specs(plan, rows))
        projections = [await self._projection(plan, member, rows) for member in members]
        specs = _average_specs(plan, rows, [member.columns for member in members])
        ranges = _range_specs(plan, rows)
        with self._blobs.writer(key) as writer:
            write_header(writer.file, [*specs, *ranges])
            for index in range(len(rows)):
                pair = specs[2 * index : 2 * index + 2]
                await self._pool.run(
                    _write_average, writer.file, pair, index, basis_source, members, factors, projections
                )
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
        rankings = [
            await self._pool.run(_rank_module, index, module.in_features, columns[index], sources)
            for index, module in enumerate(plan.shapes.modules)
        ]
        with self._blobs.writer(key) as writer:
            results = [
                TensorSpec(f"{index}.token", INT64, ranking.shape, module.name)
                for index, (module, ranking) in enumerate(zip(plan.shapes.modules, rankings, strict=True))
            ]
            write_header(writer.file, results)
            for spec, ranking in zip(results, rankings, strict=True):
                write_tensor(writer.file, spec, ranking)
            return await self._pool.run(writer.commit)

    async def _spread(self, calls: Iterable[Callable[[], Result]]) -> list[Result]:
        """Run independent calls on all threads of the pool."""
        return await spread((functools.partial(self._pool.run, call) for call in calls), self._pool.threads)

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
        specs = [*_projection_specs(plan, member.rank, rows), *_range_specs(plan, rows)]
        return await self._source(member.projection, specs)

    def _write_basis(
        self,
        file: BinaryIO,
        plan: Plan,
        index: int,
        spec: TensorSpec,
        members: Sequence[CohortMember],
        factors: Sequence[TensorSource],
    ) -> None:
        rows = plan.shapes.modules[index].out_features
        batch = rows * sum(member.rank for member in members) <= self._batch_values
        weights = [member.weight for member in members]
        lefts = (source.read(2 * index) for source in factors)
        try:
            directions = basis(list(lefts), weights, plan.cap) if batch else _sketched(rows, plan.cap, lefts, weights)
        except np.linalg.LinAlgError as error:
            raise InternalFault(
                f"basis of {spec.module}: expected the decomposition to converge, it did not",
                hint="look for unusual values in the agents' figures of this round",
                context={"module": spec.module},
            ) from error
        write_tensor(file, spec, directions)

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
        specs, range_specs = _projection_specs(plan, rank, rows), _range_specs(plan, rows)
        with self._blobs.writer(key) as writer:
            write_header(writer.file, [*specs, *range_specs])
            for index, spec in enumerate(specs):
                write_tensor(writer.file, spec, _projection(basis_source, factors, index))
            for spec, values in zip(range_specs, ranges, strict=True):
                write_tensor(writer.file, spec, values)
            return writer.commit()


class _InOrder:
    """Appends what concurrent steps make to a blob from front to back; hashing overlaps with the other steps.

    Every step waits for its turn, so there are never more results than steps at once.
    """

    def __init__(self, pool: WorkerPool, writer: BlobWriter) -> None:
        self._pool = pool
        self._writer = writer
        self._ready: dict[int, memoryview] = {}
        self._next = 0
        self._turn = asyncio.Lock()

    async def append(self, start: int, data: memoryview) -> None:
        """Append the bytes from `start` on, now or as soon as those before are there."""
        self._ready[start] = data
        async with self._turn:
            while (part := self._ready.pop(self._next, None)) is not None:
                await self._pool.run(self._writer.extend, part)
                self._next += len(part)


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


def _basis_specs(plan: Plan, ranks: Sequence[int]) -> list[TensorSpec]:
    return _rows_specs(plan, [basis_rows(module.out_features, ranks, plan.cap) for module in plan.shapes.modules])


def _rows_specs(plan: Plan, rows: Sequence[int]) -> list[TensorSpec]:
    return [
        TensorSpec(f"{index}.basis", FLOAT32, (module.out_features, count), module.name)
        for index, (module, count) in enumerate(zip(plan.shapes.modules, rows, strict=True))
    ]


def _projection_specs(plan: Plan, rank: int, rows: Sequence[int]) -> list[TensorSpec]:
    return [
        TensorSpec(f"{index}.projection", FLOAT32, (count, rank), module.name)
        for index, (module, count) in enumerate(zip(plan.shapes.modules, rows, strict=True))
    ]


def _range_specs(plan: Plan, rows: Sequence[int]) -> list[TensorSpec]:
    """Ranges of all modules with dense packing, else none; behind the other tensors of a file."""
    return [
        TensorSpec(f"{index}.range", FLOAT32, (count,), module.name)
        for index, (module, count) in enumerate(zip(plan.shapes.modules, rows, strict=True))
        if plan.packing is Packing.DENSE
    ]


def _average_specs(plan: Plan, rows: Sequence[int], columns: Sequence[Sequence[int]]) -> list[TensorSpec]:
    """Basis and plain columns of every module; the plain columns begin at the smallest k of the members."""
    specs: list[TensorSpec] = []
    for index, (module, count) in enumerate(zip(plan.shapes.modules, rows, strict=True)):
        first = min(member_columns[index] for member_columns in columns)
        specs.append(TensorSpec(f"{index}.basis", FLOAT32, (module.out_features, count), module.name))
        specs.append(TensorSpec(f"{index}.plain", FLOAT32, (count, module.in_features - first), module.name))
    return specs


def _stored_rows(path: Path, plan: Plan) -> list[int]:
    """Basis rows s per module as the basis file has them: the cohort it was made for may have been larger."""
    shapes = stored_shapes(path, len(plan.shapes.modules))
    return [shapes[f"{index}.basis"][-1] for index in range(len(plan.shapes.modules))]


def _write_average(
    file: BinaryIO,
    pair: Sequence[TensorSpec],
    index: int,
    basis_source: TensorSource,
    members: Sequence[CohortMember],
    factors: Sequence[TensorSource],
    projections: Sequence[TensorSource],
) -> None:
    basis_spec, plain_spec = pair
    write_tensor(file, basis_spec, basis_source.read(index))
    total = np.zeros(plain_spec.shape)
    for member, left_right, projection in zip(members, factors, projections, strict=True):
        right = left_right.read(2 * index + 1)
        total += plain_part(projection.read(index), right, member.weight, plain_spec.shape[1])
    write_tensor(file, plain_spec, total)


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
