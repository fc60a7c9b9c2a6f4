"""How many columns an agent encrypts.

A budget is `full` (every column, the default), a fraction, a column count, or `auto`: the largest fraction whose
predicted encrypt and upload time fits a number of seconds. docs/threat-model.md says what anything below full leaks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from enum import Enum
from typing import Final

from shelora.errors import InvalidConfiguration, SizeMismatch
from shelora.plan.layout import SlotLayout
from shelora.plan.packing import Packing
from shelora.plan.shapes import MAX_DIMENSION, ModuleShape

DEFAULT_AUTO_SECONDS: Final = 30.0
"""What `auto` without a number of seconds means."""

MAX_AUTO_SECONDS: Final = 1e9
"""Largest number of seconds of an `auto` budget."""

_MAX_TEXT_CHARACTERS: Final = 64
_NUMBER: Final = r"(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d{1,3})?"
_PERCENT: Final = re.compile(rf"({_NUMBER})\s*%", re.ASCII)
_FRACTION: Final = re.compile(rf"((?=[^e]*\.|.*e){_NUMBER})", re.ASCII)
_COLUMNS: Final = re.compile(r"(\d{1,9})\s*(?:columns?|c)", re.ASCII)
_AUTO: Final = re.compile(rf"auto(?:\s*:\s*({_NUMBER})\s*s)?", re.ASCII)
_FORMS: Final = 'write "full", "25%", "0.25", "20 columns", "auto" or "auto:12s"'


class BudgetKind(Enum):
    """The four forms of a budget."""

    FULL = "full"
    FRACTION = "fraction"
    COLUMNS = "columns"
    AUTO = "auto"


@dataclass(frozen=True)
class Budget:
    """An agent's HE budget; make one with `full`, `fraction`, `columns`, `auto` or `parse_budget`.

    `str(budget)` is a text that `parse_budget` reads back as an equal budget.

    Attributes:
        kind: which form.
        amount: full: 1; fraction: 0 to 1; columns: a whole number; auto: seconds per upload, > 0 to 1e9.

    Raises:
        InvalidConfiguration: the amount is out of bounds for its kind.
    """

    kind: BudgetKind
    amount: float

    @classmethod
    def full(cls) -> Budget:
        """Encrypt every column."""
        return cls(BudgetKind.FULL, 1)

    @classmethod
    def fraction(cls, fraction: float) -> Budget:
        """Encrypt this part of the columns of every module, 0 to 1."""
        return cls(BudgetKind.FRACTION, fraction)

    @classmethod
    def columns(cls, columns: int) -> Budget:
        """Encrypt this many columns of every module, or all where there are fewer."""
        return cls(BudgetKind.COLUMNS, columns)

    @classmethod
    def auto(cls, seconds: float = DEFAULT_AUTO_SECONDS) -> Budget:
        """Encrypt as much as can be encrypted and uploaded in this many seconds."""
        return cls(BudgetKind.AUTO, seconds)

    def __post_init__(self) -> None:
        """Check the amount against its kind."""
        valid = {
            BudgetKind.FULL: self.amount == 1,
            BudgetKind.FRACTION: 0 <= self.amount <= 1,
            BudgetKind.COLUMNS: 0 <= self.amount <= MAX_DIMENSION and self.amount == int(self.amount),
            BudgetKind.AUTO: 0 < self.amount <= MAX_AUTO_SECONDS,
        }
        if not valid[self.kind]:
            raise InvalidConfiguration(
                f"expected a fraction of 0 to 1, a whole number of columns of 0 to {MAX_DIMENSION}, or seconds above 0 "
                f"and up to {MAX_AUTO_SECONDS:.0f}, got {self.kind.value} {self.amount}",
                hint=_FORMS,
            )

    def __str__(self) -> str:
        """The text form."""
        if self.kind is BudgetKind.FRACTION:
            return f"{_text(_decimal(self.amount) * 100)}%"
        if self.kind is BudgetKind.COLUMNS:
            return f"{int(self.amount)} columns"
        if self.kind is BudgetKind.AUTO:
            return f"auto:{_text(_decimal(self.amount))}s"
        return "full"


@dataclass(frozen=True)
class HeRate:
    """What an agent measured about itself.

    Attributes:
        encrypt_values_per_s: real values encoded and encrypted per second, all threads together, > 0.
        upload_bytes_per_s: upload bandwidth, > 0.

    Raises:
        InvalidConfiguration: a rate that is not a finite number > 0.
    """

    encrypt_values_per_s: float
    upload_bytes_per_s: float

    def __post_init__(self) -> None:
        """Check both rates."""
        for name, rate in vars(self).items():
            if not 0 < rate < math.inf:
                raise InvalidConfiguration(f"expected {name} > 0 and finite, got {rate}", hint="measure the rate again")

    def seconds(self, blocks: int, values_per_block: int, block_bytes: int) -> float:
        """Predicted seconds to encrypt and then upload so many whole blocks."""
        return blocks * values_per_block / self.encrypt_values_per_s + blocks * block_bytes / self.upload_bytes_per_s


def parse_budget(text: str) -> Budget:
    """Read a budget from configuration.

    Args:
        text: "full", "25%", "0.25", "20 columns", "20c", "auto" or "auto:12s"; case and outer blanks do not matter.
            A bare whole number is refused, because "1" could mean one column or all of them.

    Returns:
        The budget; `parse_budget(str(budget)) == budget`.

    Raises:
        InvalidConfiguration: another form, or a number out of bounds.
    """
    word = text.strip().lower()
    if len(word) <= _MAX_TEXT_CHARACTERS:
        if word == "full":
            return Budget.full()
        if match := _PERCENT.fullmatch(word):
            return Budget.fraction(float(Decimal(match[1]) / 100))
        if match := _FRACTION.fullmatch(word):
            return Budget.fraction(float(match[1]))
        if match := _COLUMNS.fullmatch(word):
            return Budget.columns(int(match[1]))
        if match := _AUTO.fullmatch(word):
            return Budget.auto(float(match[1]) if match[1] else DEFAULT_AUTO_SECONDS)
    raise InvalidConfiguration(f"expected a budget, got {text[:_MAX_TEXT_CHARACTERS]!r}", hint=_FORMS)


def resolve_columns(budget: Budget, n: int, *, fallback: Budget | None = None) -> int:
    """The number of encrypted columns of a module with n columns.

    A fraction f gives f * n rounded half up, computed on the shortest decimal form of f, and at least 1 when f > 0.

    Args:
        budget: the budget.
        n: input width of the module.
        fallback: the budget that stands in for `auto`, which cannot be resolved one module at a time.

    Returns:
        k, 0 to n; never smaller for a larger budget of the same kind.

    Raises:
        InvalidConfiguration: `auto` without a fallback that is not `auto`.
    """
    if budget.kind is BudgetKind.AUTO:
        if fallback is None or fallback.kind is BudgetKind.AUTO:
            raise InvalidConfiguration(
                f"expected a budget that one module resolves alone, got {budget}",
                hint="resolve it for the whole plan with a measured rate",
            )
        budget = fallback
    if budget.kind is BudgetKind.COLUMNS:
        return min(int(budget.amount), n)
    if budget.kind is BudgetKind.FRACTION and budget.amount > 0:
        return max(1, int((_decimal(budget.amount) * n).to_integral_value(ROUND_HALF_UP)))
    return n if budget.kind is BudgetKind.FULL else 0


def resolve_plan_columns(
    budget: Budget,
    modules: Sequence[ModuleShape],
    rate: HeRate | None,
    basis_rows: Sequence[int],
    dense_values: int,
    *,
    values_per_block: int = 4096,
    block_bytes: int = 65536,
    packing: Packing = Packing.EXACT,
) -> tuple[int, ...]:
    """The number of encrypted columns of every module.

    For `auto` this is the largest common fraction t / max(n), t a whole number, of which the predicted seconds of all
    resulting blocks fit the budget. Dense tensors are always encrypted and counted; when they alone take longer, no
    column is encrypted.

    Args:
        budget: the budget.
        modules: LoRA modules in plan order.
        rate: the agent's measured rate; only `auto` needs it.
        basis_rows: basis rows s per module, to be expected for the cohort.
        dense_values: number of values in all dense tensors together.
        values_per_block: real values in a ciphertext block.
        block_bytes: bytes of a ciphertext block on the wire.
        packing: the federation's packing.

    Returns:
        k per module.

    Raises:
        InvalidConfiguration: `auto` without a rate.
        SizeMismatch: `basis_rows` has another length than `modules`.
        InvalidPlan: basis rows or block size out of bounds.
    """
    if len(basis_rows) != len(modules):
        raise SizeMismatch(
            f"expected basis rows for {len(modules)} modules, got {len(basis_rows)}",
            hint="compute them from the same plan",
        )
    if budget.kind is not BudgetKind.AUTO:
        return tuple(resolve_columns(budget, module.in_features) for module in modules)
    if rate is None:
        raise InvalidConfiguration(
            f"expected a measured encrypt and upload rate for the budget {budget}, got none",
            hint="measure the rate first, or choose a fixed budget",
        )
    layout = SlotLayout((), tuple(modules), tuple(basis_rows), values_per_block, packing)
    steps = max((module.in_features for module in modules), default=0)

    def columns_at(step: int) -> tuple[int, ...]:
        return tuple((2 * step * module.in_features + steps) // (2 * steps) for module in modules)

    def fits(step: int) -> bool:
        reals = dense_values + layout.reals(layout.used_slots(columns_at(step)))
        blocks = -(-reals // values_per_block)
        return rate.seconds(blocks, values_per_block, block_bytes) <= budget.amount

    low, high = 0, steps
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return columns_at(low)


def _decimal(amount: float) -> Decimal:
    """The shortest decimal that reads back as this float: what a person typed."""
    return abs(Decimal(repr(float(amount))))


def _text(number: Decimal) -> str:
    """Without trailing zeros, and without an exponent for whole numbers."""
    whole = number.to_integral_value()
    return str(int(whole)) if number == whole else str(number.normalize())
