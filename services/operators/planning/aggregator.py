"""What a round costs the aggregator."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from services.operators.planning.costs import DOUBLE_BYTES, FLOAT_BYTES, AgentCost, Published
from services.operators.planning.rates import Rates
from services.operators.planning.terms import Participant
from shelora.plan import ModelShapes, ModuleShape, Packing, SlotLayout
from shelora.rounds import FOLD_TERMS

BATCH_VALUES: Final = 1 << 20
"""Left factors of a module with more values than this are sketched one by one, not decomposed at once."""

THREADS: Final = 2
"""Modules or ranges of blocks that are computed at once."""

BLOCKS_AT_ONCE: Final = 64
"""Blocks of the sum that a thread has in memory."""

_PIECE_BYTES: Final = 4 << 20
"""A piece of a file that is digested."""

_BATCH_VALUE_BYTES: Final = 48
"""Memory of a decomposition per value, all copies and the library's workspace together; sketches need less."""

_SKETCH_VALUE_BYTES: Final = 36
_SQUARE_VALUE_BYTES: Final = 40
"""The same per entry of the small square factor."""

_TENSOR_BYTES: Final = 400
"""What the aggregator notes down about one tensor of one member's payload."""

_READ_SHARE: Final = 0.5
"""Converting a float32 number costs half as much as moving a float64 one."""

_WRITE_PASSES: Final = 1.5
"""Writing a result costs so much more than reading it."""


@dataclass(frozen=True)
class AggregatorCost:
    """What one round costs the aggregator.

    Seconds are of one core, without what gRPC and TLS take. Bytes are raw tensor and ciphertext bytes.

    Attributes:
        basis_s: common basis of all left factors.
        projection_s: every member's projection.
        average_s: sum of the plain columns.
        sum_s: sum of the ciphertexts' residues, which are taken to arrive two at a time.
        check_s: checks and digests of everything received.
        cpu_s: all of these.
        peak_ram_bytes: most that computing holds at once, on top of the idle process.
        ram_ceiling_bytes: the same for any number of agents of these ranks; notes about payloads come on top, see
            `notes_bytes`.
        notes_bytes: what is noted down about the members' payloads while a step runs; grows with their number.
        staged_bytes: on disk at the end of the round, before the members' payloads are deleted.
        kept_bytes: of it what stays for agents that come later.
        in_bytes, out_bytes: received and sent.
    """

    basis_s: float
    projection_s: float
    average_s: float
    sum_s: float
    check_s: float
    cpu_s: float
    peak_ram_bytes: int
    ram_ceiling_bytes: int
    notes_bytes: int
    staged_bytes: int
    kept_bytes: int
    in_bytes: int
    out_bytes: int


def aggregator_cost(
    shapes: ModelShapes,
    layout: SlotLayout,
    participants: Sequence[Participant],
    agents: Sequence[AgentCost],
    published: Published,
    cap: int,
    rates: Rates,
) -> AggregatorCost:
    """What a round costs in which all participants count.

    Args:
        shapes: what is trained.
        layout: slots of the cohort.
        participants: the cohort.
        agents: what it costs each of them.
        published: what all fetch at the end.
        cap: largest number of basis rows.
        rates: speeds of the aggregator's machine.
    """
    ranks = [participant.rank for participant in participants]
    rows = list(zip(shapes.modules, layout.basis_rows, strict=True))
    factors, cipher = sum(cost.factors_bytes for cost in agents), sum(cost.cipher_up_bytes for cost in agents)
    projections = sum(cost.projection_bytes for cost in agents)
    basis = FLOAT_BYTES * sum(module.out_features * s for module, s in rows)
    basis_s = sum(_basis_s(module.out_features, ranks, cap, rates) for module in shapes.modules)
    projection_s = _projection_s(layout, rows, ranks, rates)
    average_s = len(ranks) * (rates.file_s + sum(rates.call_s + rates.move_s(s * m.in_features) for m, s in rows))
    average_s += rates.digest_s(factors)
    sum_s = rates.digest_s(cipher) + rates.digest_s(_folds(len(ranks)) * (1 + _WRITE_PASSES) * published.cipher_bytes)
    check_s = rates.digest_s(_WRITE_PASSES * (factors + cipher))
    notes = 2 * len(shapes.modules) * len(ranks) * _TENSOR_BYTES
    return AggregatorCost(
        basis_s=basis_s,
        projection_s=projection_s,
        average_s=average_s,
        sum_s=sum_s,
        check_s=check_s,
        cpu_s=basis_s + projection_s + average_s + sum_s + check_s,
        peak_ram_bytes=_ram_bytes(shapes, layout, ranks, cap, published) + notes,
        ram_ceiling_bytes=_ceiling_bytes(shapes, layout, max(ranks), cap, published),
        notes_bytes=notes,
        # While the sum is made anew, the old one is there too.
        staged_bytes=factors + cipher + projections + basis + published.average_bytes + 2 * published.cipher_bytes,
        kept_bytes=published.average_bytes + published.cipher_bytes,
        in_bytes=factors + cipher,
        out_bytes=sum(cost.down_bytes for cost in agents),
    )


def _folds(members: int) -> int:
    """How often the sum is written."""
    return math.ceil(members / FOLD_TERMS)


def _basis_s(rows: int, ranks: Sequence[int], cap: int, rates: Rates) -> float:
    total = sum(ranks)
    reading = len(ranks) * rates.call_s + _READ_SHARE * rates.move_s(rows * total)
    if rows * total <= BATCH_VALUES:
        return reading + rates.svd_s(rows, total)
    mean = total / len(ranks)
    # The sketch is cut to the cap as soon as it holds more than twice as many columns.
    cuts = max(0, math.ceil((total - 2 * cap) / (cap + mean / 2)))
    return reading + cuts * rates.svd_s(rows, 2 * cap + math.ceil(mean / 2)) + rates.svd_s(rows, min(total, 2 * cap))


def _projection_s(
    layout: SlotLayout, rows: Sequence[tuple[ModuleShape, int]], ranks: Sequence[int], rates: Rates
) -> float:
    """Dense packing needs every projection once more, for the ranges."""
    times = 2 if layout.packing is Packing.DENSE else 1
    common = sum(rates.call_s + _READ_SHARE * rates.move_s(s * module.out_features) for module, s in rows)
    products = sum(rates.product_s(s, module.out_features, sum(ranks)) for module, s in rows)
    return len(ranks) * (rates.file_s + times * common) + times * products


def _ram_bytes(shapes: ModelShapes, layout: SlotLayout, ranks: Sequence[int], cap: int, published: Published) -> int:
    """Peak over the steps; a thread holds one module, or one range of blocks."""
    total, largest = sum(ranks), max(ranks)
    basis = _at_once(_basis_bytes(module.out_features, total, largest, cap) for module in shapes.modules)
    return max(basis, _PIECE_BYTES + _other_bytes(shapes, layout, largest, published))


def _ceiling_bytes(shapes: ModelShapes, layout: SlotLayout, largest: int, cap: int, published: Published) -> int:
    """The same for a cohort of any size: bases are at their cap, and as many factors as fit are decomposed at once."""
    batches = ((module.out_features, BATCH_VALUES // module.out_features) for module in shapes.modules)
    basis = _at_once(
        max(_basis_bytes(rows, columns, largest, cap) for columns in (batch, batch + 1)) for rows, batch in batches
    )
    capped = SlotLayout(
        shapes.dense,
        shapes.modules,
        tuple(min(cap, module.out_features) for module in shapes.modules),
        layout.values_per_block,
        layout.packing,
    )
    return max(basis, _PIECE_BYTES + _other_bytes(shapes, capped, largest, published))


def _basis_bytes(rows: int, total: int, largest: int, cap: int) -> int:
    batch = rows * total <= BATCH_VALUES
    columns = total if batch else min(total, 2 * cap + largest)
    square = min(rows, columns) ** 2
    return (_BATCH_VALUE_BYTES if batch else _SKETCH_VALUE_BYTES) * rows * columns + _SQUARE_VALUE_BYTES * square


def _other_bytes(shapes: ModelShapes, layout: SlotLayout, largest: int, published: Published) -> int:
    """Averages hold the sum of a module, one member's part of it and its right factor; sums two ranges of blocks."""
    average = _at_once(
        DOUBLE_BYTES * module.in_features * (2 * s + 2 * largest)
        for module, s in zip(shapes.modules, layout.basis_rows, strict=True)
    )
    block_bytes = published.cipher_bytes // published.blocks if published.blocks else 0
    return max(average, THREADS * min(published.blocks, BLOCKS_AT_ONCE) * block_bytes)


def _at_once(modules: Iterable[int]) -> int:
    """Bytes of the largest modules, one a thread."""
    return sum(sorted(modules, reverse=True)[:THREADS])
