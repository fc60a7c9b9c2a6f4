"""Rounds of the protocol in one process: the agents' and the aggregator's own code, real encryption, no network."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from services.aggregator.compute import LocalCompute
from services.aggregator.domain import CohortMember
from services.client_agent.negotiation import natural_priorities
from services.client_agent.round import (
    AveragedUpdate,
    LocalUpdate,
    cipher_values,
    factor_tensors,
    open_average,
    wire_orders,
)
from services.client_agent.state import load_tensors, write_tensors
from services.common.blobs import Blob, DirectoryBlobStore
from services.common.threads import WorkerPool
from shelora.he.parameters import CkksParameters
from shelora.he.residues import as_blocks
from shelora.he.secret import CkksContext, Decryptor, Encryptor
from shelora.plan import FederationSeed, ModelShapes, Negotiation, Packing, Plan, parse_budget, resolve_plan_columns

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

FEDERATION: Final = "parity"
EPOCH: Final = 1
CAP_OF_LARGEST: Final = 4
"""The product's default basis cap, as a multiple of the largest rank."""


@dataclass(frozen=True, eq=False)
class Keys:
    """A key epoch.

    Attributes:
        encryptor, decryptor: the agents' halves.
        parameters: what the aggregator knows.
    """

    encryptor: Encryptor
    decryptor: Decryptor
    parameters: CkksParameters


def draw_keys(threads: int) -> Keys:
    """A fresh key pair of the product's parameters."""
    context = CkksContext.create()
    pair = context.generate_keys()
    encryptor = Encryptor(context, pair.public, threads)
    return Keys(encryptor, Decryptor(context, pair.public, pair.secret, threads), context.parameters)


@dataclass(frozen=True, eq=False)
class Exchanged:
    """One round's outcome.

    Attributes:
        average: as every agent opens it.
        sent_bytes: factors and ciphertext of every agent.
    """

    average: AveragedUpdate
    sent_bytes: tuple[int, ...]


class Exchange:
    """A cohort's rounds between trained updates and the opened average.

    Attributes:
        plan: what agents and aggregator agree on.
        seed: the federation's secret seed.
    """

    def __init__(
        self,
        folder: Path,
        keys: Keys,
        shapes: ModelShapes,
        ranks: Sequence[int],
        seed: FederationSeed,
        *,
        packing: Packing = Packing.EXACT,
        cap: int | None = None,
        budgets: Sequence[str] = ("full",),
    ) -> None:
        """Agree on a plan.

        Args:
            folder: for the aggregator's blobs; emptied.
            keys: of the epoch.
            shapes: what is averaged.
            ranks: of what is sent, one an agent.
            seed: what column orders and fresh rows are drawn from.
            packing: of the ciphertexts.
            cap: largest number of basis rows; None takes the product's default.
            budgets: what agents encrypt, repeated.
        """
        self.seed = seed
        self._folder, self._keys, self._ranks = folder, keys, tuple(ranks)
        self._columns = [
            resolve_plan_columns(
                parse_budget(budgets[index % len(budgets)]), shapes.modules, None, [1] * len(shapes.modules), 0
            )
            for index in range(len(ranks))
        ]
        self.plan = Plan(
            federation=FEDERATION,
            version=1,
            epoch=EPOCH,
            shapes=shapes,
            cap=cap or CAP_OF_LARGEST * max(ranks),
            negotiation=Negotiation.ENCRYPTED,
            levels=tuple(tuple(sorted(set(levels))) for levels in zip(*self._columns, strict=True)),
            parameters_digest=keys.parameters.digest(),
            values_per_block=keys.parameters.values_per_block,
            packing=packing,
        )

    def average(
        self,
        number: int,
        updates: Sequence[LocalUpdate],
        examples: Sequence[int],
    ) -> Exchanged:
        """One round.

        Args:
            number: of the round; column orders depend on it.
            updates: one an agent, of the agents' ranks.
            examples: one an agent.
        """
        return asyncio.run(self._average(number, updates, examples))

    async def _average(
        self,
        number: int,
        updates: Sequence[LocalUpdate],
        examples: Sequence[int],
    ) -> Exchanged:
        shutil.rmtree(self._folder, ignore_errors=True)
        blobs, pool = DirectoryBlobStore(self._folder), WorkerPool(1)
        try:
            compute = LocalCompute(blobs, pool)
            orders = wire_orders(self.seed, self.plan, number, natural_priorities(self.plan.shapes))
            members = [
                await self._send_factors(blobs, index, update, orders, examples) for index, update in enumerate(updates)
            ]
            basis = await compute.compute_basis(self.plan, members, "round")
            members = [replace(member, projection=basis.projections[member.agent]) for member in members]
            ciphers = [
                await self._send_cipher(blobs, member, update, orders)
                for member, update in zip(members, updates, strict=True)
            ]
            largest = [max(counts) for counts in zip(*self._columns, strict=True)]
            blocks = self.plan.layout(self._ranks).blocks(largest)
            total = await compute.fold_residues(None, ciphers, blocks, self._keys.parameters, "sum")
            plain = await compute.compute_average(self.plan, basis.basis, members, "average")
            average = self._open(blobs.path(plain.key), blobs.path(total.key), orders, members)
        finally:
            pool.close()
        sent = [
            member.factors.size_bytes + cipher.size_bytes
            for member, cipher in zip(members, ciphers, strict=True)
            if member.factors is not None
        ]
        return Exchanged(average, tuple(sent))

    async def _send_factors(
        self,
        blobs: DirectoryBlobStore,
        index: int,
        update: LocalUpdate,
        orders: tuple[Int64, ...],
        examples: Sequence[int],
    ) -> CohortMember:
        columns = self._columns[index]
        sent = self._folder / f"factors-{index}"
        write_tensors(sent, factor_tensors(update, orders, columns))
        return CohortMember(
            agent=f"agent-{index}",
            rank=self._ranks[index],
            columns=columns,
            weight=examples[index] / sum(examples),
            examples=examples[index],
            factors=await blobs.write(f"factors-{index}", [sent.read_bytes()]),
        )

    async def _send_cipher(
        self,
        blobs: DirectoryBlobStore,
        member: CohortMember,
        update: LocalUpdate,
        orders: tuple[Int64, ...],
    ) -> Blob:
        assert member.projection is not None  # answered with the basis
        projections = load_tensors(blobs.path(member.projection.key))
        layout = self.plan.layout(self._ranks)
        values = cipher_values(update, orders, member.columns, projections, member.weight, layout)
        sent = self._keys.encryptor.encrypt(values).tobytes()
        return await blobs.write(f"cipher-{member.agent}", [sent])

    def _open(
        self, plain: Path, total: Path, orders: tuple[Int64, ...], members: Sequence[CohortMember]
    ) -> AveragedUpdate:
        layout, parameters = self.plan.layout(self._ranks), self._keys.parameters
        blocks = as_blocks(total.read_bytes(), parameters)
        count = min(len(blocks) * parameters.values_per_block, layout.reals(layout.total_slots))
        first_plain = [min(counts) for counts in zip(*self._columns, strict=True)]
        opened = self._keys.decryptor.decrypt(blocks, count)
        weight = sum(member.weight for member in members)
        return open_average(load_tensors(plain), opened, orders, layout, first_plain, weight)
