"""Where every encrypted value sits: one vector of slots that is cut into ciphertext blocks.

Dense tensors come first. Then come columns: position `p` of a module with `n` columns has the key (2p + 1) / (2n);
columns are sorted by that key, then by module, and each takes as many consecutive slots as its module has basis rows.
A column whose key is at most f is exactly one that the fraction f, rounded half up, encrypts: so a smaller fraction
fills a prefix of the slots and sends fewer blocks. A slot is a real number of a ciphertext, or with dense packing, but
for the dense tensors, half of one. The layout is a pure function of the plan and the cohort's ranks; both sides compute
it, only its digest travels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from shelora.errors import InvalidPlan, ShapeMismatch, SizeMismatch
from shelora.plan.encoding import digest_items
from shelora.plan.packing import Packing, join_pairs, split_pairs
from shelora.plan.shapes import DenseShape, ModuleShape, shape_items

MAX_VALUES_PER_BLOCK: Final = 1 << 20
"""Largest number of values in a ciphertext block."""


def check_values_per_block(values_per_block: int) -> None:
    """Refuse a block size outside 1 to `MAX_VALUES_PER_BLOCK`.

    Args:
        values_per_block: real values in a ciphertext block.

    Raises:
        InvalidPlan: out of bounds.
    """
    if not 1 <= values_per_block <= MAX_VALUES_PER_BLOCK:
        raise InvalidPlan(
            f"expected 1 to {MAX_VALUES_PER_BLOCK} values in a block, got {values_per_block}",
            hint="take the number from the epoch's HE parameters",
        )


@dataclass(frozen=True)
class SlotLayout:
    """The slots of one round.

    Attributes:
        dense: dense tensors in plan order.
        modules: LoRA modules in plan order.
        basis_rows: basis rows s per module, 1 to out_features.
        values_per_block: real values in a ciphertext block.
        packing: whether a column's slots have a real number each, or two of them share one.

    Raises:
        InvalidPlan: basis rows out of bounds or not one per module, or a bad block size.
    """

    dense: tuple[DenseShape, ...]
    modules: tuple[ModuleShape, ...]
    basis_rows: tuple[int, ...]
    values_per_block: int
    packing: Packing = Packing.EXACT

    def __post_init__(self) -> None:
        """Check basis rows and block size."""
        check_values_per_block(self.values_per_block)
        if len(self.basis_rows) != len(self.modules):
            raise InvalidPlan(
                f"expected basis rows for {len(self.modules)} modules, got {len(self.basis_rows)}",
                hint="compute them from the same plan",
            )
        for module, rows in zip(self.modules, self.basis_rows, strict=True):
            if not 1 <= rows <= module.out_features:
                raise InvalidPlan(
                    f"expected 1 to {module.out_features} basis rows in {module.name!r}, got {rows}",
                    hint="a basis has at most as many directions as the module has outputs",
                    context={"module": module.name},
                )

    @cached_property
    def dense_slots(self) -> int:
        """Slots of all dense tensors together."""
        return sum(tensor.size for tensor in self.dense)

    @cached_property
    def total_slots(self) -> int:
        """Slots of everything at full budget."""
        columns = (s * module.in_features for module, s in zip(self.modules, self.basis_rows, strict=True))
        return self.dense_slots + sum(columns)

    def reals(self, slots: int) -> int:
        """Real numbers that hold the first slots.

        Args:
            slots: how many, `dense_slots` or more.

        Returns:
            As many; with dense packing half as many, rounded up, for the slots after the dense tensors.
        """
        if self.packing is Packing.EXACT:
            return slots
        return self.dense_slots - (self.dense_slots - slots) // 2

    @cached_property
    def _column_offsets(self) -> tuple[NDArray[np.int64], ...]:
        """Per module, the first slot of every position.

        The keys are compared as float64: division is rounded correctly, so equal fractions give equal floats, and
        different ones with denominators up to 2 * MAX_DIMENSION are 2**-42 apart or more.
        """
        if not self.modules:
            return ()
        widths = np.array([module.in_features for module in self.modules], dtype=np.int64)
        keys = np.concatenate([(2 * np.arange(n, dtype=np.int64) + 1) / (2 * n) for n in widths])
        order = np.argsort(keys, kind="stable")
        sizes = np.repeat(np.array(self.basis_rows, dtype=np.int64), widths)[order]
        offsets = np.empty(keys.size, dtype=np.int64)
        offsets[order] = self.dense_slots + np.cumsum(sizes) - sizes
        offsets.flags.writeable = False
        return tuple(np.split(offsets, np.cumsum(widths)[:-1]))

    def offsets(self, module_index: int) -> NDArray[np.int64]:
        """First slot of every column position of a module.

        Args:
            module_index: index into `modules`.

        Returns:
            int64[n], increasing, read-only; position p occupies `basis_rows[module_index]` slots from there.
        """
        return self._column_offsets[module_index]

    def dense_offset(self, dense_index: int) -> int:
        """First slot of a dense tensor.

        Args:
            dense_index: index into `dense`.

        Returns:
            The slot of its first value in C order.
        """
        return sum(tensor.size for tensor in self.dense[:dense_index])

    def used_slots(self, columns: Sequence[int]) -> int:
        """Slots up to and including the last one in use.

        Args:
            columns: encrypted columns k per module, each 0 to n.

        Returns:
            Last used slot + 1; the dense tensors alone when every k is 0.

        Raises:
            SizeMismatch: not one k per module.
            ShapeMismatch: a k out of range.
        """
        _check_count("column counts", len(columns), len(self.modules))
        used = self.dense_slots
        for index, (module, k) in enumerate(zip(self.modules, columns, strict=True)):
            if not 0 <= k <= module.in_features:
                raise ShapeMismatch(
                    f"expected 0 to {module.in_features} encrypted columns in {module.name!r}, got {k}",
                    hint="resolve the budget against this plan",
                    context={"module": module.name},
                )
            if k:
                used = max(used, int(self.offsets(index)[k - 1]) + self.basis_rows[index])
        return used

    def blocks(self, columns: Sequence[int]) -> int:
        """Ciphertext blocks an agent sends.

        Args:
            columns: encrypted columns k per module.

        Returns:
            The real numbers of `used_slots(columns)` over the block size, rounded up.

        Raises:
            SizeMismatch, ShapeMismatch: as `used_slots`.
        """
        return -(-self.reals(self.used_slots(columns)) // self.values_per_block)

    def pack(self, dense: Sequence[NDArray[np.float64]], columns: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
        """Put dense tensors and encrypted columns into their slots.

        Args:
            dense: one float array per dense tensor, of its shape.
            columns: per module float[s, k], the first k columns in wire order; k may differ by module.

        Returns:
            float64[used_slots], zero in slots between that nothing occupies.

        Raises:
            SizeMismatch: another number of arrays than tensors.
            ShapeMismatch: an array of another shape.
        """
        _check_count("dense tensors", len(dense), len(self.dense))
        _check_count("modules", len(columns), len(self.modules))
        for module, rows, part in zip(self.modules, self.basis_rows, columns, strict=True):
            if part.ndim != 2 or part.shape[0] != rows:
                raise ShapeMismatch(
                    f"expected columns of shape ({rows}, k) for {module.name!r}, got {part.shape}",
                    hint="project with this round's basis first",
                    context={"module": module.name},
                )
        slots = np.zeros(self.used_slots([part.shape[1] for part in columns]))
        start = 0
        for tensor, values in zip(self.dense, dense, strict=True):
            if values.shape != tensor.shape:
                raise ShapeMismatch(
                    f"expected shape {tensor.shape} for {tensor.name!r}, got {values.shape}",
                    hint="train the tensors the plan names",
                    context={"tensor": tensor.name},
                )
            slots[start : start + tensor.size] = values.ravel()
            start += tensor.size
        for index, (rows, part) in enumerate(zip(self.basis_rows, columns, strict=True)):
            k = part.shape[1]
            if k:
                windows = sliding_window_view(slots, rows, writeable=True)
                windows[self.offsets(index)[:k]] = part.T
        return slots

    def unpack(self, values: NDArray[np.float64]) -> tuple[list[NDArray[np.float64]], list[NDArray[np.float64]]]:
        """Take slots apart again; the inverse of `pack`, linear in `values`.

        Args:
            values: float[count], a prefix of the slots, dense_slots <= count <= total_slots.

        Returns:
            The dense tensors, float64 of their shapes; and per module float64[s, n] in wire order, zero where `values`
            does not reach.

        Raises:
            SizeMismatch: too short for the dense tensors, or longer than everything.
        """
        slots = np.asarray(values, dtype=np.float64)
        if slots.ndim != 1 or not self.dense_slots <= slots.size <= self.total_slots:
            raise SizeMismatch(
                f"expected a vector of {self.dense_slots} to {self.total_slots} values, got shape {slots.shape}",
                hint="decrypt the blocks of this round with this round's layout",
            )
        dense: list[NDArray[np.float64]] = []
        start = 0
        for tensor in self.dense:
            dense.append(slots[start : start + tensor.size].reshape(tensor.shape).copy())
            start += tensor.size
        reach = slots.size
        if reach < self.total_slots:
            slots = np.concatenate([slots, np.zeros(max(self.basis_rows))])
        columns: list[NDArray[np.float64]] = []
        for index, (module, rows) in enumerate(zip(self.modules, self.basis_rows, strict=True)):
            offsets = self.offsets(index)
            k = int(np.searchsorted(offsets, reach))
            part = np.zeros((rows, module.in_features))
            if k:
                part[:, :k] = sliding_window_view(slots, rows)[offsets[:k]].T
            columns.append(part)
        return dense, columns

    def to_reals(self, slots: NDArray[np.float64]) -> NDArray[np.float64]:
        """What is encrypted for packed slots.

        Args:
            slots: float64[count] from `pack`, count >= dense_slots; with dense packing the columns are quantised.

        Returns:
            float64[reals(count)].
        """
        return slots if self.packing is Packing.EXACT else join_pairs(slots, self.dense_slots)

    def from_reals(self, reals: NDArray[np.float64]) -> NDArray[np.float64]:
        """The slots behind decrypted real numbers; the inverse of `to_reals`.

        Args:
            reals: float64[count], a prefix of the round's, dense_slots <= count <= reals(total_slots).

        Returns:
            float64: a prefix of the slots for `unpack`, which may end with one more slot than went in.

        Raises:
            ValueOutOfRange: with dense packing, sums that honest agents cannot have made.
        """
        if self.packing is Packing.EXACT:
            return reals
        return split_pairs(reals, self.dense_slots)[: self.total_slots]

    def digest(self) -> bytes:
        """SHA-256 over everything that determines the slots; equal exactly when both sides agree.

        Returns:
            bytes[32].
        """
        items = [*shape_items(self.modules, self.dense), *self.basis_rows, self.values_per_block]
        return digest_items("shelora slot layout v2", [*items, self.packing.value])


def _check_count(kind: str, count: int, expected: int) -> None:
    if count != expected:
        raise SizeMismatch(f"expected {expected} {kind}, got {count}", hint="give one per tensor, in plan order")
