from __future__ import annotations

import json

import pytest

from bench.audit.publication import PAGE, fill, sections
from services.operators.leakage import TABLE


def test_sections_are_replaced_and_the_rest_stays() -> None:
    page = "a\n<!-- generated: one -->\nold\n<!-- end -->\nb\n<!-- generated: two -->\n<!-- end -->\n"
    got = fill(page, {"one": "1", "two": "2"})
    assert got == "a\n<!-- generated: one -->\n1\n<!-- end -->\nb\n<!-- generated: two -->\n2\n<!-- end -->\n"
    assert fill(got, {"one": "1", "two": "2"}) == got


@pytest.mark.parametrize("generated", [{}, {"one": "1", "two": "2"}])
def test_a_page_with_other_sections_is_refused(generated) -> None:
    with pytest.raises(ValueError, match="one marked section"):
        fill("<!-- generated: one -->\n<!-- end -->", generated)


def test_the_page_has_every_section_and_the_table_every_part() -> None:
    page = PAGE.read_text(encoding="utf-8")
    names = [part.split(" ")[0] for part in page.split("<!-- generated: ")[1:]]
    assert fill(page, dict.fromkeys(names, "x"))
    assert set(json.loads(TABLE.read_text())) >= {"budgets", "trainings", "orders", "membership", "plain_step_left"}
    assert callable(sections)
