from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.audit import GENESIS, AuditRecord, chained, check_chain
from shelora.errors import StoredBytesCorrupt

TEXTS = st.tuples(st.text(max_size=8), st.text(max_size=8), st.text(max_size=8), st.text(max_size=8))


def chain(lines: list[tuple[str, str, str, str]]) -> list[AuditRecord]:
    records: list[AuditRecord] = []
    for number, (actor, action, subject, outcome) in enumerate(lines, 1):
        records.append(
            chained(
                records[-1].digest if records else GENESIS,
                sequence=number,
                at_ms=1000 * number,
                actor=actor,
                action=action,
                subject=subject,
                outcome=outcome,
            )
        )
    return records


@given(st.lists(TEXTS, max_size=6), st.integers(0, 6))
def test_a_chain_verifies_whole_and_in_pieces(lines: list[tuple[str, str, str, str]], cut: int) -> None:
    records = chain(lines)
    whole = check_chain(records)
    assert whole == (len(lines), records[-1].digest if records else GENESIS)
    after, digest = check_chain(records[:cut])
    assert check_chain(records[cut:], digest, after) == whole


@given(st.lists(TEXTS, min_size=1, max_size=6), st.data())
def test_any_changed_field_breaks_the_chain_there(lines: list[tuple[str, str, str, str]], data: st.DataObject) -> None:
    records = chain(lines)
    at = data.draw(st.integers(0, len(records) - 1))
    field = data.draw(st.sampled_from(["actor", "action", "subject", "outcome", "at_ms", "digest"]))
    old = getattr(records[at], field)
    new = {int: lambda: old + 1, str: lambda: old + "x", bytes: lambda: bytes(31) + b"x"}[type(old)]()
    records[at] = replace(records[at], **{field: new})
    with pytest.raises(StoredBytesCorrupt, match=f"record {at + 1}"):
        check_chain(records)


@given(st.lists(TEXTS, min_size=2, max_size=6), st.data())
def test_a_missing_record_leaves_a_gap(lines: list[tuple[str, str, str, str]], data: st.DataObject) -> None:
    records = chain(lines)
    at = data.draw(st.integers(0, len(records) - 2))
    with pytest.raises(StoredBytesCorrupt, match=f"expected record {at + 1}, got record {at + 2}"):
        check_chain(records[:at] + records[at + 1 :])


def test_moving_text_between_fields_changes_the_digest() -> None:
    assert chain([("ab", "c", "", "")])[0].digest != chain([("a", "bc", "", "")])[0].digest
