"""The plan of a federation: everything that aggregator and agents must agree on before a round.

The byte formulas count raw tensor bytes (float32) and raw ciphertext residues, without framing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Final

from shelora.errors import InvalidPlan, ShapeMismatch, SizeMismatch
from shelora.lora.basis import basis_rows
from shelora.plan.encoding import DIGEST_BYTES, digest_items
from shelora.plan.layout import SlotLayout, check_values_per_block
from shelora.plan.packing import Packing
from shelora.plan.shapes import ModelShapes, check_name, shape_items

FLOAT_BYTES: Final = 4
"""Bytes of a plain value on the wire (float32)."""

BYTES_PER_ENCRYPTED_VALUE: Final = 16
"""Bytes of ciphertext per real number: two residues of 8 bytes (the block header never travels)."""

MAX_CAP: Final = 65_536
"""Largest basis cap."""


class Negotiation(Enum):
    """How the agents agree on the column order."""

    NONE = "none"
    ENCRYPTED = "encrypted"
    OPE = "ope"


@dataclass(frozen=True)
class Plan:
    """One version of a federation's plan.

    Attributes:
        federation: federation name.
        version: plan version, >= 0; a new one for every negotiation.
        epoch: key epoch, >= 0.
        shapes: what is averaged.
        cap: largest number of basis rows per module, 1 to `MAX_CAP`.
        negotiation: how the column order was agreed; NONE only where every level is 0 or the full width.
        levels: per module the distinct encrypted-column counts of the agents, strictly increasing, each 0 to n.
        parameters_digest: bytes[32], digest of the epoch's HE parameters.
        values_per_block: real values in a ciphertext block.
        packing: how values become those real values.

    Raises:
        InvalidPlan: an attribute breaks these rules.
    """

    federation: str
    version: int
    epoch: int
    shapes: ModelShapes
    cap: int
    negotiation: Negotiation
    levels: tuple[tuple[int, ...], ...]
    parameters_digest: bytes
    values_per_block: int
    packing: Packing = Packing.EXACT

    def __post_init__(self) -> None:
        """Check every attribute."""
        check_name("federation", self.federation)
        if self.version < 0 or self.epoch < 0:
            raise InvalidPlan(
                f"expected version and epoch >= 0, got version {self.version} and epoch {self.epoch}",
                hint="take both from the federation's status",
            )
        if not 1 <= self.cap <= MAX_CAP:
            raise InvalidPlan(
                f"expected a basis cap of 1 to {MAX_CAP}, got {self.cap}", hint="four times the largest rank is usual"
            )
        if len(self.parameters_digest) != DIGEST_BYTES:
            raise InvalidPlan(
                f"expected a parameters digest of {DIGEST_BYTES} bytes, got {len(self.parameters_digest)}",
                hint="fetch the epoch from the key manager again",
            )
        check_values_per_block(self.values_per_block)
        self._check_levels()

    def _check_levels(self) -> None:
        if len(self.levels) != len(self.shapes.modules):
            raise InvalidPlan(
                f"expected levels for {len(self.shapes.modules)} modules, got {len(self.levels)}",
                hint="resolve every agent's budget against these shapes",
            )
        for module, counts in zip(self.shapes.modules, self.levels, strict=True):
            n = module.in_features
            if not counts or list(counts) != sorted(set(counts)) or counts[0] < 0 or counts[-1] > n:
                raise InvalidPlan(
                    f"expected strictly increasing column counts between 0 and {n} for {module.name!r}, "
                    f"got {len(counts)} counts {counts[:8]}",
                    hint="resolve every agent's budget against these shapes",
                    context={"module": module.name},
                )
            if self.negotiation is Negotiation.NONE and not {0, n}.issuperset(counts):
                raise InvalidPlan(
                    f"expected only 0 or {n} encrypted columns in {module.name!r} without negotiation, "
                    f"got {counts[:8]}",
                    hint="negotiate an order, or give every agent the full budget",
                    context={"module": module.name},
                )

    def digest(self) -> bytes:
        """SHA-256 over the whole plan, computed once; equal exactly when both sides agree on all of it.

        Returns:
            bytes[32].
        """
        return self._digest

    def __hash__(self) -> int:
        """Of the digest: plans are looked up at every step of every agent, and may have thousands of fields."""
        return hash(self._digest)

    @cached_property
    def _digest(self) -> bytes:
        items: list[str | int | bytes] = [self.federation, self.version, self.epoch, self.cap, self.negotiation.value]
        items += shape_items(self.shapes.modules, self.shapes.dense)
        for counts in self.levels:
            items += (len(counts), *counts)
        items += (self.parameters_digest, self.values_per_block, self.packing.value)
        return digest_items("shelora plan v2", items)

    def layout(self, ranks: Sequence[int]) -> SlotLayout:
        """The slots of a round.

        Args:
            ranks: LoRA rank of every cohort member, in any order.

        Returns:
            The layout with s = min(sum of ranks, cap, m) basis rows per module.

        Raises:
            RankMismatch: no ranks, or a rank that is impossible for a module.
        """
        rows = tuple(basis_rows(module.out_features, ranks, self.cap) for module in self.shapes.modules)
        return SlotLayout(self.shapes.dense, self.shapes.modules, rows, self.values_per_block, self.packing)

    def cipher_blocks(self, ranks: Sequence[int], columns: Sequence[int]) -> int:
        """Ciphertext blocks that an agent sends.

        Args:
            ranks: LoRA rank of every cohort member.
            columns: the agent's encrypted columns k per module.

        Returns:
            Number of blocks.

        Raises:
            RankMismatch: bad ranks.
            SizeMismatch, ShapeMismatch: bad column counts.
        """
        return self.layout(ranks).blocks(columns)

    @property
    def max_cipher_bytes(self) -> int:
        """Ciphertext bytes that no agent of any cohort exceeds: the cap reached and the largest level encrypted."""
        rows = tuple(min(self.cap, module.out_features) for module in self.shapes.modules)
        layout = SlotLayout(self.shapes.dense, self.shapes.modules, rows, self.values_per_block, self.packing)
        return cipher_bytes(layout, tuple(counts[-1] for counts in self.levels))


def cipher_bytes(layout: SlotLayout, columns: Sequence[int]) -> int:
    """Ciphertext bytes of one agent's upload, or of the published sum for the largest k per module.

    Args:
        layout: the round's slots.
        columns: encrypted columns k per module.

    Returns:
        Bytes: blocks * values_per_block * 16.

    Raises:
        SizeMismatch, ShapeMismatch: bad column counts.
    """
    return layout.blocks(columns) * layout.values_per_block * BYTES_PER_ENCRYPTED_VALUE


def factors_bytes(shapes: ModelShapes, rank: int, columns: Sequence[int]) -> int:
    """Bytes of one agent's left factors and plain right-factor columns.

    Args:
        shapes: the federation's model.
        rank: the agent's LoRA rank r.
        columns: the agent's encrypted columns k per module.

    Returns:
        Bytes: 4 * sum over modules of m * r + r * (n - k).

    Raises:
        SizeMismatch: not one k per module.
        ShapeMismatch: a k out of range.
    """
    return _pair_bytes(shapes, [rank] * len(shapes.modules), columns)


def average_bytes(shapes: ModelShapes, rows: Sequence[int], columns: Sequence[int]) -> int:
    """Bytes of the plain part of a published average; `cipher_bytes` of the largest k comes on top.

    Args:
        shapes: the federation's model.
        rows: basis rows s per module.
        columns: per module the smallest k of the members that count.

    Returns:
        Bytes: 4 * sum over modules of m * s (basis) + s * (n - k) (plain columns).

    Raises:
        SizeMismatch: not one s and one k per module.
        ShapeMismatch: a k out of range.
    """
    return _pair_bytes(shapes, rows, columns)


def range_bytes(packing: Packing, rows: Sequence[int]) -> int:
    """Bytes of the ranges that dense packing adds to a projection and to a published average.

    Args:
        packing: the plan's packing.
        rows: basis rows s per module.

    Returns:
        Bytes: 4 * sum of s with dense packing, else 0.
    """
    return FLOAT_BYTES * sum(rows) if packing is Packing.DENSE else 0


def _pair_bytes(shapes: ModelShapes, inner: Sequence[int], columns: Sequence[int]) -> int:
    """Bytes of a float32 matrix pair per module, m x inner and inner x (n - k)."""
    _check_module_count(shapes, "inner dimensions", len(inner))
    _check_module_count(shapes, "column counts", len(columns))
    values = 0
    for module, width, k in zip(shapes.modules, inner, columns, strict=True):
        if not 0 <= k <= module.in_features:
            raise ShapeMismatch(
                f"expected 0 to {module.in_features} encrypted columns in {module.name!r}, got {k}",
                hint="resolve the budget against this plan",
                context={"module": module.name},
            )
        values += width * (module.out_features + module.in_features - k)
    return FLOAT_BYTES * values


def _check_module_count(shapes: ModelShapes, kind: str, count: int) -> None:
    if count != len(shapes.modules):
        raise SizeMismatch(
            f"expected {kind} for {len(shapes.modules)} modules, got {count}", hint="give one per module, in plan order"
        )
