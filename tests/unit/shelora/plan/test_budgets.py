from __future__ import annotations

import itertools
import math
from decimal import ROUND_HALF_UP, Decimal

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from shelora.errors import InvalidConfiguration, InvalidPlan, SizeMismatch
from shelora.plan import (
    DEFAULT_AUTO_SECONDS,
    Budget,
    HeRate,
    ModuleShape,
    Packing,
    SlotLayout,
    parse_budget,
    resolve_columns,
    resolve_plan_columns,
)

fractions = st.floats(0, 1)
widths = st.integers(1, 5000)
budgets = st.one_of(
    st.just(Budget.full()),
    fractions.map(Budget.fraction),
    st.integers(0, 1_000_000).map(Budget.columns),
    st.floats(0, 1e9, exclude_min=True).map(Budget.auto),
)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("full", Budget.full()),
        (" FULL ", Budget.full()),
        ("25%", Budget.fraction(0.25)),
        ("12.5 %", Budget.fraction(0.125)),
        ("0%", Budget.fraction(0.0)),
        ("100%", Budget.fraction(1.0)),
        ("0.25", Budget.fraction(0.25)),
        (".5", Budget.fraction(0.5)),
        ("1.0", Budget.fraction(1.0)),
        ("1e-3", Budget.fraction(0.001)),
        ("20 columns", Budget.columns(20)),
        ("1 column", Budget.columns(1)),
        ("20c", Budget.columns(20)),
        ("auto", Budget.auto(DEFAULT_AUTO_SECONDS)),
        ("auto:12s", Budget.auto(12)),
        ("auto : 0.5 s", Budget.auto(0.5)),
    ],
)
def test_parse(text: str, budget: Budget) -> None:
    assert parse_budget(text) == budget


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        (Budget.full(), "full"),
        (Budget.fraction(0.25), "25%"),
        (Budget.fraction(0.00125), "0.125%"),
        (Budget.fraction(1), "100%"),
        (Budget.fraction(-0.0), "0%"),
        (Budget.columns(20), "20 columns"),
        (Budget.auto(), "auto:30s"),
        (Budget.auto(1200), "auto:1200s"),
        (Budget.auto(2.5), "auto:2.5s"),
    ],
)
def test_text(budget: Budget, text: str) -> None:
    assert str(budget) == text


@given(budgets)
def test_text_reads_back(budget: Budget) -> None:
    assert parse_budget(str(budget)) == budget
    assert hash(parse_budget(str(budget))) == hash(budget)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "all",
        "1",
        "20",
        "101%",
        "-5%",
        "1.5",
        "nan",
        "inf",
        "1e999%",
        "-1 columns",
        "1000001c",
        "2.5 columns",
        "auto:0s",
        "auto:1e999s",
        "auto:12",
        "auto:s",
        "٣%",
        "0.25" + "0" * 100,
    ],
)
def test_other_texts_are_refused_with_the_forms(text: str) -> None:
    with pytest.raises(InvalidConfiguration) as caught:
        parse_budget(text)
    assert "25%" in caught.value.hint
    assert len(caught.value.message) < 300


@given(st.text(max_size=20))
def test_parse_never_fails_otherwise(text: str) -> None:
    try:
        budget = parse_budget(text)
    except InvalidConfiguration:
        return
    assert parse_budget(str(budget)) == budget


@pytest.mark.parametrize("fraction", [-0.1, 1.0000001, math.nan, math.inf])
def test_fraction_bounds(fraction: float) -> None:
    with pytest.raises(InvalidConfiguration):
        Budget.fraction(fraction)


@pytest.mark.parametrize("columns", [-1, 1_000_001, 2.5, math.nan, math.inf])
def test_column_bounds(columns: float) -> None:
    with pytest.raises(InvalidConfiguration):
        Budget.columns(columns)  # type: ignore[arg-type]  # configuration may hold any number


@pytest.mark.parametrize("seconds", [0, -1, 1.1e9, math.nan, math.inf])
def test_auto_bounds(seconds: float) -> None:
    with pytest.raises(InvalidConfiguration):
        Budget.auto(seconds)


@given(fractions, widths)
def test_fraction_rounds_half_up_and_takes_at_least_one(fraction: float, n: int) -> None:
    k = resolve_columns(Budget.fraction(fraction), n)
    exact = int((Decimal(repr(fraction)) * n).to_integral_value(ROUND_HALF_UP))
    assert k == (max(1, exact) if fraction > 0 else 0)
    assert 0 <= k <= n


def test_halves_of_typed_decimals_round_up() -> None:
    assert 0.29 * 50 < 14.5
    assert resolve_columns(Budget.fraction(0.29), 50) == 15
    assert resolve_columns(parse_budget("25%"), 10) == 3


@given(fractions, fractions, widths)
def test_fractions_nest(first: float, second: float, n: int) -> None:
    low, high = sorted((first, second))
    assert resolve_columns(Budget.fraction(low), n) <= resolve_columns(Budget.fraction(high), n)
    assert resolve_columns(Budget.fraction(high), n) <= resolve_columns(Budget.full(), n) == n


@given(st.integers(0, 6000), st.integers(0, 6000), widths)
def test_column_counts_nest(first: int, second: int, n: int) -> None:
    low, high = sorted((first, second))
    assert resolve_columns(Budget.columns(low), n) <= resolve_columns(Budget.columns(high), n) <= n
    assert resolve_columns(Budget.columns(high), n) == min(high, n)


def test_auto_needs_a_fallback_to_resolve_alone() -> None:
    assert resolve_columns(Budget.auto(), 10, fallback=Budget.full()) == 10
    assert resolve_columns(Budget.columns(3), 10, fallback=Budget.full()) == 3
    for fallback in (None, Budget.auto()):
        with pytest.raises(InvalidConfiguration, match="auto:30s"):
            resolve_columns(Budget.auto(), 10, fallback=fallback)


MODULES = (ModuleShape("a", 40, 30), ModuleShape("b", 40, 90), ModuleShape("c", 40, 7))


def test_fixed_budgets_resolve_module_by_module() -> None:
    assert resolve_plan_columns(Budget.full(), MODULES, None, (4, 4, 4), 0) == (30, 90, 7)
    assert resolve_plan_columns(Budget.fraction(0.1), MODULES, None, (4, 4, 4), 0) == (3, 9, 1)
    assert resolve_plan_columns(Budget.columns(20), MODULES, None, (4, 4, 4), 0) == (20, 20, 7)


def common_fraction(step: int) -> tuple[int, ...]:
    return tuple(math.floor(module.in_features * step / 90 + 0.5) for module in MODULES)


@given(
    st.floats(1e-3, 10),
    st.floats(10, 1e5),
    st.floats(10, 1e6),
    st.tuples(*[st.integers(1, 40)] * 3),
    st.integers(0, 500),
    st.sampled_from(Packing),
)
def test_auto_is_the_largest_common_fraction_that_fits(
    seconds: float, encrypt: float, upload: float, rows: tuple[int, int, int], dense: int, packing: Packing
) -> None:
    rate = HeRate(encrypt, upload)
    columns = resolve_plan_columns(
        Budget.auto(seconds), MODULES, rate, rows, dense, values_per_block=16, block_bytes=256, packing=packing
    )
    layout = SlotLayout((), MODULES, rows, 16, packing)

    def predicted(k: tuple[int, ...]) -> float:
        blocks = math.ceil((dense + layout.reals(layout.used_slots(k))) / 16)
        return blocks * 16 / encrypt + blocks * 256 / upload

    fitting = [step for step in range(91) if predicted(common_fraction(step)) <= seconds]
    assert columns == common_fraction(max(fitting, default=0))


def test_auto_grows_with_the_seconds() -> None:
    rate = HeRate(5_000, 50_000)
    found = [
        resolve_plan_columns(Budget.auto(seconds), MODULES, rate, (4, 4, 4), 0, values_per_block=16, block_bytes=256)
        for seconds in (1e-6, 0.1, 0.2, 0.4, 100)
    ]
    assert found[0] == (0, 0, 0)
    assert found[-1] == (30, 90, 7)
    for smaller, larger in itertools.pairwise(found):
        assert all(low <= high for low, high in zip(smaller, larger, strict=True))
    assert len(set(found)) > 3


def test_auto_counts_dense_tensors() -> None:
    rate = HeRate(5_000, 50_000)
    without = resolve_plan_columns(Budget.auto(3), MODULES, rate, (4, 4, 4), 0)
    with_dense = resolve_plan_columns(Budget.auto(3), MODULES, rate, (4, 4, 4), 40_960)
    assert without == (30, 90, 7)
    assert with_dense == (0, 0, 0)


def test_auto_without_modules_has_nothing_to_choose() -> None:
    assert resolve_plan_columns(Budget.auto(), (), HeRate(1, 1), (), 10) == ()


def test_auto_needs_a_rate() -> None:
    with pytest.raises(InvalidConfiguration, match="got none"):
        resolve_plan_columns(Budget.auto(), MODULES, None, (4, 4, 4), 0)


def test_basis_rows_must_fit() -> None:
    with pytest.raises(SizeMismatch, match="got 2"):
        resolve_plan_columns(Budget.full(), MODULES, None, (4, 4), 0)
    with pytest.raises(InvalidPlan):
        resolve_plan_columns(Budget.auto(), MODULES, HeRate(1, 1), (4, 4, 41), 0)


@given(st.floats(), st.floats())
def test_rates_are_positive(encrypt: float, upload: float) -> None:
    assume(not (0 < encrypt < math.inf and 0 < upload < math.inf))
    with pytest.raises(InvalidConfiguration, match="per_s"):
        HeRate(encrypt, upload)
