"""What an agent computes in one round, as plain functions over arrays: no network, no disk, no keys.

The steps are those of docs/method.md section 5. Matrices are in true column order except where a name says `wire`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from services.client_agent.adapter import AdapterState
from shelora.errors import MalformedPayload, NonFiniteValue, ShapeMismatch
from shelora.lora import (
    Factors,
    average,
    canonical,
    cipher_part,
    dense_average,
    initial_adapter,
    join,
    reparameterize,
    split,
)
from shelora.plan import (
    FederationSeed,
    ModuleShape,
    Packing,
    Plan,
    SlotLayout,
    dequantise,
    fresh_rows,
    quantise,
    undo,
    wire_order,
)

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
_MISSING_AFTER_FLOAT32 = 1e-6
"""Factors and basis travel as float32, so directions that are missing come back at about 1e-8 of the largest."""


@dataclass(frozen=True, eq=False)
class LocalUpdate:
    """What one agent contributes to a round, in the clear; it never leaves the agent in this form.

    Attributes:
        factors: canonical factors per module, left float64[m, r], right float64[r, n].
        dense: float64 tensors trained whole, in plan order.
    """

    factors: tuple[Factors, ...]
    dense: tuple[Float64, ...]


@dataclass(frozen=True, eq=False)
class AveragedUpdate:
    """A published average, opened.

    Attributes:
        basis: float64[m, s] per module, orthonormal columns.
        core: float64[s, n] per module; basis @ core is the averaged update.
        dense: float64 tensors, in plan order.
    """

    basis: tuple[Float64, ...]
    core: tuple[Float64, ...]
    dense: tuple[Float64, ...]

    @property
    def modules(self) -> Iterator[tuple[Float64, Float64]]:
        """(basis, core) per module."""
        return zip(self.basis, self.core, strict=True)


def local_update(
    adapter: AdapterState, scaling: float, residual: Sequence[Factors] = (), sent_rank: int | None = None
) -> LocalUpdate:
    """Bring a trained adapter into canonical form, module by module, with the residual that was kept beside it.

    Args:
        adapter: what was trained.
        scaling: its alpha / rank.
        residual: per module, or empty where nothing was kept.
        sent_rank: the rank of what is sent; None takes each module's own.
    """
    kept = residual or (None,) * len(adapter.modules)
    factors = tuple(
        canonical(module.b, module.a, scaling)
        if rest is None and sent_rank in (None, module.rank)
        else join(module, scaling, rest, sent_rank or module.rank)
        for module, rest in zip(adapter.modules, kept, strict=True)
    )
    return LocalUpdate(factors, tuple(np.asarray(tensor, dtype=np.float64) for tensor in adapter.dense))


def wire_orders(seed: FederationSeed, plan: Plan, round_number: int, priorities: Sequence[Int64]) -> tuple[Int64, ...]:
    """The secret column order of every module in one round: order[p] is the true column at wire position p."""
    return tuple(
        wire_order(seed, plan.federation, plan.version, round_number, module.name, module.in_features, priority, levels)
        for module, priority, levels in zip(plan.shapes.modules, priorities, plan.levels, strict=True)
    )


def factor_tensors(update: LocalUpdate, orders: Sequence[Int64], columns: Sequence[int]) -> dict[str, Float32]:
    """The factors payload: left factors whole, right factors without their first k wire columns.

    Args:
        update: the agent's update.
        orders: wire order per module.
        columns: encrypted columns k per module.

    Returns:
        "<module index>.left" float32[m, r] and "<module index>.right" float32[r, n - k].
    """
    tensors: dict[str, Float32] = {}
    for index, (factors, order, hidden) in enumerate(zip(update.factors, orders, columns, strict=True)):
        tensors[f"{index}.left"] = np.ascontiguousarray(factors.left, dtype=np.float32)
        tensors[f"{index}.right"] = np.ascontiguousarray(factors.right[:, order[hidden:]], dtype=np.float32)
    return tensors


def cipher_values(
    update: LocalUpdate,
    orders: Sequence[Int64],
    columns: Sequence[int],
    projections: Mapping[str, npt.NDArray[np.floating]],
    weight: float,
    layout: SlotLayout,
) -> Float64:
    """The numbers an agent encrypts, in slot order: weighted dense tensors, then first columns of every module.

    Args:
        update: the agent's update.
        orders: wire order per module.
        columns: encrypted columns k per module.
        projections: "<module index>.projection" float[s, r] as the aggregator answered; with dense packing also
            "<module index>.range" float[s].
        weight: the agent's share w of the cohort's examples, 0 to 1.
        layout: slot layout of the cohort.

    Returns:
        float64[real numbers of the used slots].

    Raises:
        ShapeMismatch, MalformedPayload: the answer does not fit the layout.
        ValueOutOfRange: with dense packing, a value that its range does not hold.
    """
    parts = []
    for index, (factors, order, hidden) in enumerate(zip(update.factors, orders, columns, strict=True)):
        projection = _tensor(
            projections, f"{index}.projection", (layout.basis_rows[index], factors.right.shape[0])
        ).astype(np.float64)
        part = cipher_part(projection, factors.right[:, order[:hidden]], weight)
        if layout.packing is Packing.DENSE:
            ranges = _tensor(projections, f"{index}.range", (layout.basis_rows[index],))
            part = quantise(layout.modules[index].name, part, projection, weight, ranges)
        parts.append(part)
    return layout.to_reals(layout.pack([weight * tensor for tensor in update.dense], parts))


def open_average(
    tensors: Mapping[str, npt.NDArray[np.floating]],
    decrypted: Float64,
    orders: Sequence[Int64],
    layout: SlotLayout,
    first_plain: Sequence[int],
    total_weight: float,
) -> AveragedUpdate:
    """Join the plain and the decrypted part of a published average and bring the columns back into true order.

    Args:
        tensors: "<module index>.basis" float[m, s] and "<module index>.plain" float[s, n - first_plain]; with dense
            packing also "<module index>.range" float[s].
        decrypted: float64[real numbers], the opened sum.
        orders: wire order per module of that round.
        layout: slot layout of that round's cohort.
        first_plain: per module the first wire position any counted member sent in the clear (its smallest k).
        total_weight: sum W of the weights that count, positive.

    Raises:
        ShapeMismatch, MalformedPayload, NonFiniteValue: the published payload does not fit the plan.
    """
    dense, parts = layout.unpack(layout.from_reals(decrypted))
    modules = list(open_modules(tensors, parts, orders, layout, first_plain, total_weight))
    return AveragedUpdate(
        tuple(basis for basis, _ in modules),
        tuple(core for _, core in modules),
        tuple(dense_average(part, total_weight) for part in dense),
    )


def open_modules(
    tensors: Mapping[str, npt.NDArray[np.floating]],
    parts: Sequence[Float64],
    orders: Sequence[Int64],
    layout: SlotLayout,
    first_plain: Sequence[int],
    total_weight: float,
) -> Iterator[tuple[Float64, Float64]]:
    """As `open_average`, one module after the other, so that no more than one is in memory.

    Args:
        tensors: as there.
        parts: the opened sum as the layout unpacks it, float64[s, k] per module.
        orders: as there.
        layout: as there.
        first_plain: as there.
        total_weight: as there.

    Yields:
        (basis float64[m, s], core float64[s, n]) per module.

    Raises:
        ShapeMismatch, MalformedPayload, NonFiniteValue: the published payload does not fit the plan.
    """
    if len(first_plain) != len(layout.modules):
        raise MalformedPayload(
            f"average: expected the first plain column of {len(layout.modules)} modules, got {len(first_plain)}",
            hint="both sides must run the same version of shelora",
        )
    for index, (module, rows, order) in enumerate(zip(layout.modules, layout.basis_rows, orders, strict=True)):
        basis = _tensor(tensors, f"{index}.basis", (module.out_features, rows)).astype(np.float64)
        first = first_plain[index]
        plain = np.zeros((rows, module.in_features))
        plain[:, first:] = _tensor(tensors, f"{index}.plain", (rows, module.in_features - first))
        part = parts[index]
        if layout.packing is Packing.DENSE:
            part = dequantise(module.name, part, _tensor(tensors, f"{index}.range", (rows,)))
        yield basis, undo(order, average(plain, part, total_weight))


def starting_adapter(seed: FederationSeed, plan: Plan, rank: int, dense: Sequence[Float64]) -> AdapterState:
    """The adapter before the first round: B = 0, A from the federation seed, so that nobody outside ever knows A."""
    modules = tuple(
        initial_adapter(rank, module.out_features, _rows(seed, plan, module, 0, rank)) for module in plan.shapes.modules
    )
    return AdapterState(modules, tuple(dense))


def refit(
    modules: Iterable[tuple[Float64, Float64]],
    dense: Sequence[Float64],
    seed: FederationSeed,
    plan: Plan,
    round_number: int,
    rank: int,
    scaling: float,
    sent_rank: int | None = None,
) -> AdapterState:
    """Best adapter of the agent's own rank for an opened average, and the residual up to the sent rank.

    Args:
        modules: (basis, core) per module, as `open_modules` yields them.
        dense: opened dense tensors.
        seed: what fresh rows are drawn from where the average lacks directions.
        plan: of the round.
        round_number: the round that was averaged.
        rank: the agent's own.
        scaling: the agent's alpha / rank.
        sent_rank: the rank of what the agent sends; None or the own rank keeps no residual.
    """
    whole = rank if sent_rank is None else sent_rank
    fitted = (
        reparameterize(
            basis,
            core,
            whole,
            scaling,
            partial(_rows, seed, plan, module, round_number, whole),
            missing=_MISSING_AFTER_FLOAT32,
        )
        for module, (basis, core) in zip(plan.shapes.modules, modules, strict=True)
    )
    if whole == rank:
        return AdapterState(tuple(fitted), tuple(dense))
    parts = [split(adapter, rank, scaling) for adapter in fitted]
    return AdapterState(tuple(fit for fit, _ in parts), tuple(dense), tuple(rest for _, rest in parts))


def _rows(seed: FederationSeed, plan: Plan, module: ModuleShape, round_number: int, rank: int) -> Float64:
    return fresh_rows(seed, plan.federation, plan.epoch, module.name, round_number, rank, module.in_features)


def _tensor(
    tensors: Mapping[str, npt.NDArray[np.floating]], name: str, shape: tuple[int, ...]
) -> npt.NDArray[np.floating]:
    found = tensors.get(name)
    if found is None:
        raise MalformedPayload(f"the aggregator's payload lacks tensor {name!r}", hint="compare both software versions")
    if found.shape != shape:
        raise ShapeMismatch(f"tensor {name!r}: expected shape {shape}, got {found.shape}")
    if not np.isfinite(found).all():
        raise NonFiniteValue(f"tensor {name!r} holds NaN or infinity")
    return found
