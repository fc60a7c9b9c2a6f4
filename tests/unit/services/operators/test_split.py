from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.operators.demo.split import HOME_LABELS, LEAST_EXAMPLES, count_labels, hold_out, split
from shelora.errors import InvalidConfiguration


def balanced(labels: int, each: int) -> list[str]:
    return [f"label-{index % labels}" for index in range(labels * each)]


@given(
    labels=st.integers(2, 8),
    each=st.integers(40, 120),
    agents=st.integers(2, 5),
    concentration=st.sampled_from([0.05, 0.5, 2.0, 50.0]),
    seed=st.integers(0, 1000),
)
def test_every_row_has_one_owner_and_every_agent_enough(labels, each, agents, concentration, seed) -> None:
    rows = balanced(labels, each)
    shares = split(rows, agents, concentration, np.random.default_rng(seed))

    assert sorted(row for share in shares for row in share) == list(range(len(rows)))
    for share in shares:
        assert share == sorted(share)
        assert len(share) >= max(LEAST_EXAMPLES, len(rows) // (4 * agents))
        assert len({rows[row] for row in share}) >= HOME_LABELS


def test_same_seed_same_split_and_another_seed_another() -> None:
    rows = balanced(6, 100)
    first, again, other = (split(rows, 4, 2.0, np.random.default_rng(seed)) for seed in (7, 7, 8))
    assert first == again
    assert first != other


def test_smaller_concentration_is_more_uneven() -> None:
    rows = balanced(6, 300)
    order = [f"label-{index}" for index in range(6)]

    def unevenness(concentration: float) -> float:
        shares = split(rows, 4, concentration, np.random.default_rng(3))
        return float(np.std([count_labels(rows, share, order) for share in shares]))

    assert unevenness(0.2) > 1.5 * unevenness(2.0) > 3 * unevenness(100.0)


def test_too_few_rows_are_refused_with_the_number_needed() -> None:
    with pytest.raises(InvalidConfiguration, match="at least 64 training rows for 4 agents, got 20"):
        split(balanced(2, 10), 4, 2.0, np.random.default_rng(0))


def test_one_label_for_everything_is_refused() -> None:
    with pytest.raises(InvalidConfiguration, match="got 1 labels"):
        split(["only"] * 100, 2, 2.0, np.random.default_rng(0))


def test_a_label_too_rare_to_serve_every_agent_is_refused_by_name() -> None:
    rows = ["common"] * 200 + ["rare"] * 2
    with pytest.raises(InvalidConfiguration, match="too few rows of rare"):
        split(rows, 4, 2.0, np.random.default_rng(0))


def test_rare_labels_beside_common_ones_are_dealt_out_too() -> None:
    rows = ["a"] * 100 + ["b"] * 100 + ["once"]
    shares = split(rows, 3, 2.0, np.random.default_rng(0))
    assert sum(200 in share for share in shares) == 1


@given(labels=st.integers(2, 6), each=st.integers(2, 50), seed=st.integers(0, 100))
def test_held_out_rows_have_the_same_mixture(labels, each, seed) -> None:
    rows = balanced(labels, each)
    train, test = hold_out(rows, 0.2, np.random.default_rng(seed))
    assert sorted(train + test) == list(range(len(rows)))
    order = sorted(set(rows))
    assert set(count_labels(rows, test, order)) == {min(each - 1, max(1, round(0.2 * each)))}


def test_nothing_can_be_held_out_of_single_rows() -> None:
    with pytest.raises(InvalidConfiguration, match="two rows"):
        hold_out(["a", "b", "c"], 0.2, np.random.default_rng(0))
