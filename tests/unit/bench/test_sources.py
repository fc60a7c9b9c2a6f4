from __future__ import annotations

from pathlib import Path

from bench.sources import fingerprint


def test_comments_and_docstrings_are_no_new_code(tmp_path: Path) -> None:
    one, two, three = (tmp_path / name for name in ("one.py", "two.py", "three.py"))
    one.write_text('"""Doc."""\nx = 1\n')
    two.write_text('"""Other."""\n\nx = 1  # why\n')
    three.write_text('"""Doc."""\nx = 2\n')
    assert fingerprint([one]) == fingerprint([two])
    assert fingerprint([one]) != fingerprint([three])


def test_data_files_count_byte_by_byte(tmp_path: Path) -> None:
    path = tmp_path / "workload.json"
    path.write_text("{}")
    before = fingerprint([path])
    path.write_text("{} ")
    assert fingerprint([path]) != before
