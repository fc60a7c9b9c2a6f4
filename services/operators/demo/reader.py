"""Labelled text from JSONL, CSV, TSV or Parquet files."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shelora.errors import InvalidConfiguration

_JSON_SUFFIXES: Final = (".jsonl", ".ndjson")
_SEPARATORS: Final[Mapping[str, str]] = {".csv": ",", ".tsv": "\t"}
_PARQUET_SUFFIX: Final = ".parquet"
_SHOWN_CHARACTERS: Final = 60

Located = tuple[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Example:
    """A text and its label; integer labels are kept as their decimal text."""

    text: str
    label: str


def read_examples(path: Path, text_field: str = "text", label_field: str = "label") -> list[Example]:
    """Read a whole file.

    Raises:
        InvalidConfiguration: the file cannot be read, or a row lacks a text or a label; names the row.
    """
    if not path.is_file():
        raise InvalidConfiguration(f"data: expected a file, got {path}, which does not exist", hint="check the path")
    try:
        examples = [_example(place, row, text_field, label_field) for place, row in _rows(path)]
    except UnicodeDecodeError as error:
        raise InvalidConfiguration(
            f"{path.name}: expected UTF-8, got other bytes at position {error.start}", hint="convert the file to UTF-8"
        ) from error
    except OSError as error:
        raise InvalidConfiguration(f"{path}: cannot be read ({error.strerror or type(error).__name__})") from error
    if not examples:
        raise InvalidConfiguration(f"{path.name}: expected at least one row, got none")
    return examples


def write_examples(path: Path, examples: Sequence[Example]) -> None:
    """Write JSONL with the fields text and label."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"text": one.text, "label": one.label}, ensure_ascii=False) + "\n" for one in examples)
    path.write_text("".join(lines), encoding="utf-8")


def sort_labels(examples: Sequence[Example]) -> tuple[str, ...]:
    """The labels that occur: integers by value, others by text.

    Raises:
        InvalidConfiguration: fewer than two.
    """
    found = {example.label for example in examples}
    if len(found) < 2:
        raise InvalidConfiguration(
            f"data: expected at least 2 different labels, got {sorted(found)}", hint="classification needs two classes"
        )
    numeric = all(label.removeprefix("-").isascii() and label.removeprefix("-").isdigit() for label in found)
    return tuple(sorted(found, key=int) if numeric else sorted(found))


def _rows(path: Path) -> Iterator[Located]:
    suffix = path.suffix.lower()
    if suffix in _JSON_SUFFIXES:
        return _json_rows(path)
    if suffix in _SEPARATORS:
        return _separated_rows(path, _SEPARATORS[suffix])
    if suffix == _PARQUET_SUFFIX:
        return _parquet_rows(path)
    known = ", ".join((*_JSON_SUFFIXES, *_SEPARATORS, _PARQUET_SUFFIX))
    raise InvalidConfiguration(f"data: expected a file that ends in {known}, got {path.name}")


def _json_rows(path: Path) -> Iterator[Located]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{path.name}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InvalidConfiguration(
                    f"{place}: expected one JSON object a line, got {line.strip()[:_SHOWN_CHARACTERS]!r}",
                    hint='write {"text": "...", "label": "..."}',
                ) from error
            if not isinstance(row, dict):
                raise InvalidConfiguration(f"{place}: expected one JSON object a line, got a {type(row).__name__}")
            yield place, row


def _separated_rows(path: Path, separator: str) -> Iterator[Located]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, delimiter=separator, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise InvalidConfiguration(
                        f"{path.name}, line {reader.line_num}: expected {len(reader.fieldnames or ())} fields as in "
                        "the header, got another number",
                        hint="put texts that hold the separator into double quotes",
                    )
                yield f"{path.name}, line {reader.line_num}", row
        except csv.Error as error:
            raise InvalidConfiguration(f"{path.name}, line {reader.line_num}: not readable as CSV ({error})") from error


def _parquet_rows(path: Path) -> Iterator[Located]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise InvalidConfiguration(
            f"{path.name}: reading Parquet needs pyarrow", hint="install pyarrow, or convert the file to JSONL"
        ) from error
    number = 0
    try:
        with ParquetFile(path) as table:
            for batch in table.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path.name}, row {number}", row
    except ArrowException as error:
        raise InvalidConfiguration(f"{path.name}: not readable as Parquet ({error})") from error


def _example(place: str, row: Mapping[str, Any], text_field: str, label_field: str) -> Example:
    for field in (text_field, label_field):
        if field not in row:
            known = ", ".join(repr(name) for name in row) or "no fields"
            raise InvalidConfiguration(
                f"{place}: expected a field {field!r}, got {known}",
                hint="rename the fields to text and label, or pass --text-field and --label-field",
            )
    text, label = row[text_field], row[label_field]
    if not isinstance(text, str) or not text.strip():
        raise InvalidConfiguration(f"{place}: expected a text in {text_field!r}, got {_shown(text)}")
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if isinstance(label, bool) or not isinstance(label, str | int) or not str(label).strip():
        raise InvalidConfiguration(
            f"{place}: expected a class name or an integer in {label_field!r}, got {_shown(label)}"
        )
    return Example(text, str(label))


def _shown(value: object) -> str:
    return repr(value)[:_SHOWN_CHARACTERS]
