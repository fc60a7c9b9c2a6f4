from __future__ import annotations

import pytest

from bench.pages import fill


def test_sections_are_replaced_and_the_rest_stays() -> None:
    page = "a\n<!-- generated: one -->\nold\n<!-- end -->\nb\n<!-- generated: two -->\n<!-- end -->\n"
    got = fill(page, {"one": "1", "two": "2"})
    assert got == "a\n<!-- generated: one -->\n1\n<!-- end -->\nb\n<!-- generated: two -->\n2\n<!-- end -->\n"
    assert fill(got, {"one": "1", "two": "2"}) == got


@pytest.mark.parametrize("generated", [{}, {"one": "1", "two": "2"}])
def test_a_page_with_other_sections_is_refused(generated: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="one marked section"):
        fill("<!-- generated: one -->\n<!-- end -->", generated)


def test_measurements_share_a_page_by_prefix() -> None:
    page = "<!-- generated: speed_one -->\n<!-- end -->\n<!-- generated: parity_one -->\nkept\n<!-- end -->\n"
    got = fill(page, {"speed_one": "1"}, prefix="speed_")
    assert got == "<!-- generated: speed_one -->\n1\n<!-- end -->\n<!-- generated: parity_one -->\nkept\n<!-- end -->\n"
