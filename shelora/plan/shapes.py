"""Shapes of the tensors that a federation trains: LoRA modules and the dense tensors beside them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from shelora.errors import InvalidPlan
from shelora.plan.encoding import digest_items

MAX_DIMENSION: Final = 1_000_000
"""Largest width, and largest single axis of a dense tensor."""

MAX_DENSE_VALUES: Final = 1_000_000_000
"""Largest number of values in one dense tensor."""

MAX_DENSE_AXES: Final = 8
"""Largest number of axes of a dense tensor."""

MAX_TENSORS: Final = 100_000
"""Largest number of modules and dense tensors together."""

MAX_NAME_CHARACTERS: Final = 512
"""Longest tensor or federation name."""


def check_name(kind: str, name: str) -> None:
    """Refuse a name that is empty, too long, or not printable.

    Args:
        kind: what the name is for, used in the message ("module", "federation", ...).
        name: the name.

    Raises:
        InvalidPlan: the name breaks the rule.
    """
    if not 0 < len(name) <= MAX_NAME_CHARACTERS or not name.isprintable():
        raise InvalidPlan(
            f"expected a {kind} name of 1 to {MAX_NAME_CHARACTERS} printable characters, got {name[:40]!r} "
            f"({len(name)} characters)",
            hint="use the dotted name of the tensor in the base model",
        )


def check_dimension(kind: str, name: str, size: int) -> None:
    """Refuse a width outside 1 to `MAX_DIMENSION`.

    Args:
        kind: which width it is, used in the message.
        name: the tensor it belongs to.
        size: the width.

    Raises:
        InvalidPlan: the width is out of bounds.
    """
    if not 1 <= size <= MAX_DIMENSION:
        raise InvalidPlan(
            f"expected {kind} of {name!r} between 1 and {MAX_DIMENSION}, got {size}",
            hint="compare the plan with the shapes of the base model",
            context={"tensor": name},
        )


@dataclass(frozen=True)
class ModuleShape:
    """A linear layer that carries a LoRA pair B (out_features x r), A (r x in_features).

    Attributes:
        name: dotted name in the base model.
        out_features: output width m.
        in_features: input width n, the number of columns of A.

    Raises:
        InvalidPlan: bad name, or a width outside 1 to `MAX_DIMENSION`.
    """

    name: str
    out_features: int
    in_features: int

    def __post_init__(self) -> None:
        """Check name and widths."""
        check_name("module", self.name)
        check_dimension("output width", self.name, self.out_features)
        check_dimension("input width", self.name, self.in_features)


@dataclass(frozen=True)
class DenseShape:
    """A tensor trained outside LoRA pairs (classifier head, norm); always encrypted.

    Attributes:
        name: dotted name in the base model.
        shape: size of every axis; the empty tuple is a scalar.

    Raises:
        InvalidPlan: bad name, more than `MAX_DENSE_AXES` axes, an axis outside 1 to `MAX_DIMENSION`, or more than
            `MAX_DENSE_VALUES` values.
    """

    name: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check name and axes."""
        check_name("dense tensor", self.name)
        if len(self.shape) > MAX_DENSE_AXES:
            raise InvalidPlan(
                f"expected at most {MAX_DENSE_AXES} axes in {self.name!r}, got {len(self.shape)}",
                hint="compare the plan with the shapes of the base model",
                context={"tensor": self.name},
            )
        for size in self.shape:
            check_dimension("an axis", self.name, size)
        if self.size > MAX_DENSE_VALUES:
            raise InvalidPlan(
                f"expected at most {MAX_DENSE_VALUES} values in {self.name!r}, got {self.size}",
                hint="train so large a tensor through a LoRA pair instead",
                context={"tensor": self.name},
            )

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ModelShapes:
    """Everything a federation averages, in its agreed order.

    Attributes:
        modules: LoRA modules.
        dense: dense tensors.

    Raises:
        InvalidPlan: nothing to train, a name used twice, or more than `MAX_TENSORS` tensors.
    """

    modules: tuple[ModuleShape, ...]
    dense: tuple[DenseShape, ...]

    def __post_init__(self) -> None:
        """Check the number of tensors and that names are unique."""
        count = len(self.modules) + len(self.dense)
        if not 1 <= count <= MAX_TENSORS:
            raise InvalidPlan(
                f"expected 1 to {MAX_TENSORS} trained tensors, got {count}",
                hint="name at least one LoRA target module or one dense tensor to train",
            )
        seen: set[str] = set()
        for name in [*(module.name for module in self.modules), *(tensor.name for tensor in self.dense)]:
            if name in seen:
                raise InvalidPlan(
                    f"expected every tensor once, got {name!r} twice",
                    hint="remove the repeated target",
                    context={"tensor": name},
                )
            seen.add(name)

    def digest(self) -> bytes:
        """SHA-256 over names and shapes in order, computed once; equal exactly when both sides agree on all of them.

        Returns:
            bytes[32].
        """
        return self._digest

    def __hash__(self) -> int:
        """Of the digest: there may be thousands of shapes, and what is made from them is looked up often."""
        return hash(self._digest)

    @cached_property
    def _digest(self) -> bytes:
        return digest_items("shelora model shapes v1", shape_items(self.modules, self.dense))


def shape_items(modules: Iterable[ModuleShape], dense: Iterable[DenseShape]) -> list[str | int]:
    """Flatten shapes into items for `shelora.plan.encoding`, each sequence preceded by its length.

    Args:
        modules: LoRA modules in order.
        dense: dense tensors in order.

    Returns:
        Texts and integers that determine both sequences.
    """
    items: list[str | int] = []
    module_list, dense_list = list(modules), list(dense)
    items.append(len(module_list))
    for module in module_list:
        items += (module.name, module.out_features, module.in_features)
    items.append(len(dense_list))
    for tensor in dense_list:
        items += (tensor.name, len(tensor.shape), *tensor.shape)
    return items
