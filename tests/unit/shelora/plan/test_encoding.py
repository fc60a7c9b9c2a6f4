from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shelora.plan.encoding import digest_items, encode_items

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
items = st.lists(st.one_of(texts, st.integers(), st.binary(max_size=8)), max_size=5)


def typed(sequence: list[str | int | bytes]) -> list[tuple[type, str | int | bytes]]:
    return [(type(item), item) for item in sequence]


@given(items, items)
def test_different_sequences_encode_differently(
    first: list[str | int | bytes], second: list[str | int | bytes]
) -> None:
    assert (encode_items(first) == encode_items(second)) == (typed(first) == typed(second))


def test_borders_and_kinds_matter() -> None:
    variants: list[list[str | int | bytes]] = [
        ["ab", "c"],
        ["a", "bc"],
        ["abc"],
        [1, 2],
        [12],
        ["12"],
        [b"12"],
        [],
        [""],
        ["", ""],
    ]
    assert len({encode_items(variant) for variant in variants}) == len(variants)


def test_encoding_is_frozen() -> None:
    assert encode_items(["é", -12, b"\0"]).hex() == "730000000000000002c3a96900000000000000032d313262000000000000000100"


def test_numpy_integers_and_bools_are_integers() -> None:
    numbers: list[Any] = [np.int64(7), True]
    assert encode_items(numbers) == encode_items([7, 1])


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError):
        encode_items([1.5])  # type: ignore[list-item]  # the refusal is what is tested


def test_digest_depends_on_the_label() -> None:
    assert digest_items("a", [1]) != digest_items("b", [1])
    assert len(digest_items("a", [])) == 32
