from __future__ import annotations

import pytest

from services.operators.planning import Rates, Terms, imagine, parse_shapes
from shelora.errors import InvalidConfiguration
from shelora.plan import Packing

PUBLISHED = parse_shapes("104*3200x3200")


def test_auto_encrypts_what_its_seconds_allow() -> None:
    slow, fast = (Rates(encrypt_values_per_s=speed, upload_bytes_per_s=speed) for speed in (1e5, 1e9))
    few = imagine(PUBLISHED, [4], ["auto:10s"], rates=slow)[0].columns
    assert 0 < few[0] < 100
    assert imagine(PUBLISHED, [4], ["auto:10s"], rates=fast)[0].columns == (3200,) * 104
    dense = imagine(PUBLISHED, [4], ["auto:10s"], Terms(packing=Packing.DENSE), rates=slow)[0].columns
    assert dense[0] == pytest.approx(2 * few[0], abs=2)
    cores = Rates(encrypt_values_per_s=0.5e5, upload_bytes_per_s=1e5, cores=2)
    assert imagine(PUBLISHED, [4], ["auto:10s"], rates=cores)[0].columns == few


def test_budgets_are_repeated_and_texts_are_kept() -> None:
    found = imagine(PUBLISHED, [4, 8, 4], ["full", "10%"], examples=7)
    assert [one.name for one in found] == ["agent-1", "agent-2", "agent-3"]
    assert [one.columns[0] for one in found] == [3200, 320, 3200]
    assert {one.examples for one in found} == {7}


def test_no_budgets_are_refused() -> None:
    with pytest.raises(InvalidConfiguration, match="at least one budget"):
        imagine(PUBLISHED, [4], [])


def test_an_open_cap_is_four_times_the_largest_rank() -> None:
    assert Terms().cap_for([4, 9]) == 36
    assert Terms(cap=5).cap_for([4, 9]) == 5
