"""The methods: what agents start a round from, and what becomes of what they trained.

FedIT (arXiv:2305.05644) averages A and B; ranks are made equal by zeros, as HetLoRA does. HetLoRA (arXiv:2401.06432)
weighs by the norm of the updates; its pruning of ranks during training is left out, so that ranks stay what they are.
FlexLoRA (arXiv:2402.11505) averages the products and cuts them to each rank. FLoRA (arXiv:2409.05976) stacks the
factors, adds the sum to the base model and starts again from fresh factors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from bench.parity.exchange import EPOCH, FEDERATION, Exchange
from bench.parity.lab import Model
from services.client_agent.adapter import AdapterState
from services.client_agent.round import local_update, refit
from services.client_agent.training.plaintext import average
from shelora.lora import Adapter, decompose, initial_adapter, pad_rank, reparameterize, truncate
from shelora.plan import FederationSeed, ModelShapes, ModuleShape, fresh_rows
from shelora.plan.plan import FLOAT_BYTES

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Cohort:
    """What all methods are given alike.

    Attributes:
        shapes: what is averaged.
        ranks, scalings, examples: one an agent.
        seed: that fresh rows are drawn from.
        dense: tensors trained whole, before the first round.
    """

    shapes: ModelShapes
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    examples: tuple[int, ...]
    seed: FederationSeed
    dense: tuple[Float64, ...]

    def rows(self, module: ModuleShape, number: int, rank: int) -> Float64:
        """Fresh rows of A, as the product draws them."""
        return fresh_rows(self.seed, FEDERATION, EPOCH, module.name, number, rank, module.in_features)

    def fresh(self, number: int, rank: int, dense: Sequence[Float64]) -> AdapterState:
        """An adapter whose update is zero."""
        modules = tuple(
            initial_adapter(rank, module.out_features, self.rows(module, number, rank))
            for module in self.shapes.modules
        )
        return AdapterState(modules, tuple(dense))


class Method(ABC):
    """One way to learn together."""

    name: ClassVar[str]
    one_model: ClassVar[bool] = False
    """Whether all agents work with the same model."""

    def __init__(self, cohort: Cohort) -> None:
        """Start all agents alike: B = 0 and the first rows of one A."""
        self.cohort = cohort
        self.models = [Model(cohort.fresh(0, rank, cohort.dense)) for rank in cohort.ranks]

    @abstractmethod
    def combine(self, number: int, trained: Sequence[AdapterState]) -> None:
        """Take what the agents trained in a round and give them `models` for the next."""

    def exported(self) -> list[Model] | None:
        """Adapters of the agents' ranks on the unchanged base model, where these are not the models themselves."""
        return None

    def sent_bytes(self) -> list[int]:
        """What each agent sent in the last round: its adapter and the tensors trained whole, in float32."""
        dense = sum(tensor.size for tensor in self.cohort.dense)
        pairs = sum(module.out_features + module.in_features for module in self.cohort.shapes.modules)
        return [FLOAT_BYTES * (rank * pairs + dense) for rank in self.cohort.ranks]


class FedIt(Method):
    """Average of A and of B."""

    name = "FedIT"

    def combine(self, number: int, trained: Sequence[AdapterState]) -> None:
        """Pad to the largest rank, average, cut."""
        weights = self._weights(trained)
        largest = max(self.cohort.ranks)
        modules = []
        for pairs in zip(*(state.modules for state in trained), strict=True):
            padded = [pad_rank(pair.b, pair.a, largest) for pair in pairs]
            b, a = (sum(w * pair[side] for w, pair in zip(weights, padded, strict=True)) for side in (0, 1))
            modules.append(Adapter(np.asarray(b), np.asarray(a)))
        dense = weighted_dense(trained, weights)
        self.models = [
            Model(AdapterState(tuple(truncate(module, rank) for module in modules), dense))
            for rank in self.cohort.ranks
        ]

    def _weights(self, trained: Sequence[AdapterState]) -> Float64:
        return shares(self.cohort.examples)


class HetLora(FedIt):
    """Average of A and of B, weighted by the norm of the updates."""

    name = "HetLoRA"

    def _weights(self, trained: Sequence[AdapterState]) -> Float64:
        norms = [
            np.sqrt(sum(float(np.linalg.norm(scaling * pair.b @ pair.a)) ** 2 for pair in state.modules))
            for state, scaling in zip(trained, self.cohort.scalings, strict=True)
        ]
        return shares(norms)


class FlexLora(Method):
    """Average of the products in the clear."""

    name = "FlexLoRA"

    def combine(self, number: int, trained: Sequence[AdapterState]) -> None:
        """Multiply out, average, cut to each rank by a full SVD."""
        cohort = self.cohort
        updates, dense = average(trained, cohort.scalings, cohort.examples)
        self.models = fits(cohort, updates, dense, number)


class Flora(Method):
    """Stacked factors added to everybody's base model."""

    name = "FLoRA"
    one_model = True

    def __init__(self, cohort: Cohort) -> None:
        """Start from the base model."""
        super().__init__(cohort)
        self._total = zero_updates(cohort.shapes)

    def combine(self, number: int, trained: Sequence[AdapterState]) -> None:
        """Add the average, start again from fresh factors."""
        cohort = self.cohort
        updates, dense = average(trained, cohort.scalings, cohort.examples)
        self._total = tuple(total + update for total, update in zip(self._total, updates, strict=True))
        self.models = [Model(cohort.fresh(number, rank, dense), self._total) for rank in cohort.ranks]

    def exported(self) -> list[Model]:
        """The best fit of each rank."""
        return fits(self.cohort, self._total, self.models[0].adapter.dense, 0)


class Ours(Method):
    """The protocol."""

    name = "ours, exact"
    sent_rank: int | None = None
    """Rank of what agents send; None: each its own."""

    def __init__(self, cohort: Cohort, exchange: Exchange) -> None:
        """Exchange updates this way."""
        super().__init__(cohort)
        self.exchange = exchange
        self._sent: tuple[int, ...] = ()
        self.average: tuple[Float64, ...] = zero_updates(cohort.shapes)

    def combine(self, number: int, trained: Sequence[AdapterState]) -> None:
        """Canonical factors, common basis, encryption, sum, refit."""
        cohort = self.cohort
        updates = [
            local_update(state, scaling, start.adapter.residual, self.sent_rank)
            for state, scaling, start in zip(trained, cohort.scalings, self.models, strict=True)
        ]
        exchanged = self.exchange.average(number, updates, cohort.examples)
        opened, self._sent = exchanged.average, exchanged.sent_bytes
        self.average = tuple(basis @ core for basis, core in opened.modules)
        seed, plan, sent = self.exchange.seed, self.exchange.plan, self.sent_rank
        self.models = [
            Model(refit(opened.modules, opened.dense, seed, plan, number, rank, scaling, sent))
            for rank, scaling in zip(cohort.ranks, cohort.scalings, strict=True)
        ]

    def sent_bytes(self) -> list[int]:
        """Factors and ciphertext."""
        return list(self._sent)


class OursCapped(Ours):
    """The protocol with a basis smaller than the sum of ranks."""

    name = "ours, capped basis"


class OursDense(Ours):
    """The protocol with two values in a real number."""

    name = "ours, dense packing"


class OursKeeping(Ours):
    """The protocol, and every agent sends the largest rank whatever it trains.

    What an agent's rank cannot hold of the last average, up to the sent rank, stays in its base weights while it trains
    and goes into what it sends: the product's own `lora.sent_rank`. The basis has as many rows as the trained ranks
    together, so the ciphertexts stay as large as without.
    """

    name = "ours, residual kept"
    one_model = True

    def __init__(self, cohort: Cohort, exchange: Exchange) -> None:
        """Send the largest rank; `exchange` must be of that rank."""
        super().__init__(cohort, exchange)
        self.sent_rank = max(cohort.ranks)

    def exported(self) -> list[Model]:
        """The best fit of each rank."""
        return [Model(replace(model.adapter, residual=())) for model in self.models]


@dataclass(frozen=True, eq=False)
class Decomposed:
    """Thin singular value decomposition.

    Attributes:
        left, energy, right: left @ diag(energy) @ right, strongest direction first.
    """

    left: Float64
    energy: Float64
    right: Float64

    def cut(self, rank: int, scaling: float, rows: Float64) -> Adapter:
        """Best adapter of a rank."""
        core = self.energy[:rank, None] * self.right[:rank]
        return reparameterize(self.left[:, :rank], core, rank, scaling, rows)


def shares(weights: Sequence[float]) -> Float64:
    """Weights that sum to 1."""
    array = np.asarray(weights, dtype=np.float64)
    total: Float64 = array / array.sum()
    return total


def weighted_dense(states: Sequence[AdapterState], weights: Float64) -> tuple[Float64, ...]:
    """Average of the tensors trained whole."""
    return tuple(
        np.tensordot(weights, np.stack(tensors), axes=1)
        for tensors in zip(*(state.dense for state in states), strict=True)
    )


def zero_updates(shapes: ModelShapes) -> tuple[Float64, ...]:
    """No update."""
    return tuple(np.zeros((module.out_features, module.in_features)) for module in shapes.modules)


def updates_of(state: AdapterState, scaling: float) -> list[Float64]:
    """Float64[m, n] per module."""
    return [scaling * pair.b @ pair.a for pair in state.modules]


def fits(cohort: Cohort, updates: Sequence[Float64], dense: tuple[Float64, ...], number: int) -> list[Model]:
    """Best adapters of every agent's rank on the unchanged base model."""
    parts = [Decomposed(*decompose(update)) for update in updates]
    return [
        Model(
            AdapterState(
                tuple(
                    part.cut(rank, scaling, cohort.rows(module, number, rank))
                    for module, part in zip(cohort.shapes.modules, parts, strict=True)
                ),
                dense,
            )
        )
        for rank, scaling in zip(cohort.ranks, cohort.scalings, strict=True)
    ]
