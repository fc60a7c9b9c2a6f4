from __future__ import annotations

import json

from bench.audit.publication import PAGE, sections
from bench.pages import fill
from services.operators.leakage import TABLE


def test_the_page_has_every_section_and_the_table_every_part() -> None:
    page = PAGE.read_text(encoding="utf-8")
    names = [part.split(" ")[0] for part in page.split("<!-- generated: ")[1:]]
    assert fill(page, dict.fromkeys(names, "x"))
    assert set(json.loads(TABLE.read_text())) >= {"budgets", "trainings", "orders", "membership", "plain_step_left"}
    assert callable(sections)
