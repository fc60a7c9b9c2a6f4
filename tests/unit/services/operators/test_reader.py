from __future__ import annotations

import json

import pyarrow
import pyarrow.parquet
import pytest

from services.operators.demo.reader import Example, read_examples, sort_labels, write_examples
from shelora.errors import InvalidConfiguration

ROWS = [
    {"text": "hello, there", "label": "a"},
    {"text": 'she said "no"', "label": "b"},
    {"text": "ünïcode", "label": "a"},
]
EXAMPLES = [Example(row["text"], row["label"]) for row in ROWS]


def test_jsonl_csv_tsv_and_parquet_hold_the_same(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in ROWS), encoding="utf-8")
    (tmp_path / "a.csv").write_text('text,label\n"hello, there",a\n"she said ""no""",b\nünïcode,a\n', encoding="utf-8")
    (tmp_path / "a.tsv").write_text(
        'label\ttext\na\thello, there\nb\t"she said ""no"""\na\tünïcode\n', encoding="utf-8"
    )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for suffix in ("jsonl", "csv", "tsv", "parquet"):
        assert read_examples(tmp_path / f"a.{suffix}") == EXAMPLES, suffix


def test_byte_order_mark_and_other_field_names(tmp_path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("sentence,intent\nhi,greeting\n", encoding="utf-8-sig")
    assert read_examples(path, "sentence", "intent") == [Example("hi", "greeting")]


def test_integer_labels_become_text_and_sort_by_value(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "x", "label": label}) + "\n" for label in (10, 2, 1.0)))
    examples = read_examples(path)
    assert [example.label for example in examples] == ["10", "2", "1"]
    assert sort_labels(examples) == ("1", "2", "10")


def test_written_examples_are_read_back(tmp_path) -> None:
    write_examples(tmp_path / "new" / "a.jsonl", EXAMPLES)
    assert read_examples(tmp_path / "new" / "a.jsonl") == EXAMPLES


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"', r"a.jsonl, line 1: expected one JSON object a line, got"),
        (
            "a.jsonl",
            b'{"text": "x", "label": "a"}\n[1]\n',
            r"a.jsonl, line 2: expected one JSON object a line, got a list",
        ),
        ("a.jsonl", b'{"text": "x"}\n', r"line 1: expected a field 'label', got 'text'"),
        ("a.jsonl", b'{"text": "", "label": "a"}\n', r"line 1: expected a text in 'text', got ''"),
        ("a.jsonl", b'{"text": 3, "label": "a"}\n', r"expected a text in 'text', got 3"),
        ("a.jsonl", b'{"text": "x", "label": true}\n', r"expected a class name or an integer in 'label', got True"),
        ("a.jsonl", b'{"text": "x", "label": 1.5}\n', r"expected a class name or an integer in 'label', got 1.5"),
        ("a.jsonl", b'{"text": "x", "label": null}\n', r"expected a class name or an integer in 'label', got None"),
        ("a.jsonl", b"", r"expected at least one row, got none"),
        ("a.jsonl", b'{"text": "\xff"}', r"a.jsonl: expected UTF-8"),
        ("a.csv", b"text,label\nx\n", r"a.csv, line 2: expected 2 fields as in the header"),
        ("a.csv", b'text,label\n"x\n', r"a.csv, line 1: not readable as CSV"),
        ("a.parquet", b"not parquet", r"a.parquet: not readable as Parquet"),
        ("a.xlsx", b"", r"expected a file that ends in .jsonl, .ndjson, .csv, .tsv, .parquet, got a.xlsx"),
    ],
)
def test_unusable_files_say_where_and_what(tmp_path, name, content, message) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InvalidConfiguration, match=message):
        read_examples(path)


def test_missing_file(tmp_path) -> None:
    with pytest.raises(InvalidConfiguration, match="does not exist"):
        read_examples(tmp_path / "none.jsonl")


def test_one_label_is_no_classification() -> None:
    with pytest.raises(InvalidConfiguration, match=r"at least 2 different labels, got \['a'\]"):
        sort_labels([Example("x", "a"), Example("y", "a")])
