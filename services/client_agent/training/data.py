"""Local texts and labels: JSONL, CSV, TSV and Parquet files, or a `datasets` data set."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from services.client_agent.config import DATA_SUFFIXES, DataSection, ModelSection, is_data_file
from shelora.errors import InvalidConfiguration
from shelora.plan.encoding import digest_items

T = TypeVar("T")

_SHOWN_CHARACTERS: Final = 60
_SHOWN_LABELS: Final = 20


@dataclass(frozen=True)
class Row:
    """One example: its text, its label as text (None without one), and where it stands, for messages."""

    text: str
    label: str | None
    origin: str


@dataclass(frozen=True)
class Corpus:
    """Local data of one agent. `labels` is the ordered class list, empty for tasks without one."""

    train: tuple[Row, ...]
    test: tuple[Row, ...]
    labels: tuple[str, ...]


def load_corpus(data: DataSection, model: ModelSection) -> Corpus:
    """Read both splits and settle the labels: those of the configuration, else those of the training data in order.

    Raises:
        InvalidConfiguration: a file that cannot be read, a missing field, an unknown label; names file, line and field.
    """
    label_field = data.label_field if model.task == "sequence-classification" else None
    train = read_rows(data.train, "data.train", data.train_split, data.text_field, label_field)
    test: list[Row] = []
    if data.test is not None:
        test = read_rows(data.test, "data.test", data.test_split, data.text_field, label_field)
    train, test = pick_evenly(train, data.limit_train), pick_evenly(test, data.limit_test)
    labels: tuple[str, ...] = ()
    if label_field is not None:
        labels = model.labels or collect_labels(train)
        check_labels((*train, *test), labels, label_field, given=bool(model.labels))
    return Corpus(tuple(train), tuple(test), labels)


def read_rows(source: str, setting: str, split: str, text_field: str, label_field: str | None) -> list[Row]:
    """Read all rows of one source.

    Args:
        source: file or `datasets` name.
        setting: the configuration field it comes from, for messages.
        split: split of a `datasets` data set.
        text_field: field with the text.
        label_field: field with the label, or None to read none.

    Raises:
        InvalidConfiguration: see `load_corpus`.
    """
    records = (
        _read_file(Path(source).expanduser(), setting)
        if is_data_file(source)
        else _read_dataset(source, setting, split)
    )
    rows = [_parse(record, origin, text_field, label_field) for origin, record in records]
    if not rows:
        raise InvalidConfiguration(f"{setting}: expected at least one row, got none in {source}")
    return rows


def pick_evenly(rows: Sequence[T], limit: int | None) -> list[T]:
    """At most `limit` rows, evenly spaced, so that a file sorted by label keeps all its labels."""
    if limit is None or limit >= len(rows):
        return list(rows)
    return [rows[index * len(rows) // limit] for index in range(limit)]


def collect_labels(rows: Iterable[Row]) -> tuple[str, ...]:
    """The labels that occur, integers by value, else by text.

    Raises:
        InvalidConfiguration: fewer than two.
    """
    found = {row.label for row in rows if row.label is not None}
    if len(found) < 2:
        raise InvalidConfiguration(
            f"data.train: expected at least 2 different labels, got {sorted(found)}",
            hint="list all classes of the federation in model.labels",
        )
    numeric = all(label.removeprefix("-").isdecimal() for label in found)
    return tuple(sorted(found, key=int) if numeric else sorted(found))


def check_labels(rows: Iterable[Row], labels: Sequence[str], label_field: str, *, given: bool) -> None:
    """Refuse a row whose label is not in the list.

    Raises:
        InvalidConfiguration: names the row and the known labels.
    """
    known = set(labels)
    for row in rows:
        if row.label not in known:
            shown = ", ".join(labels[:_SHOWN_LABELS]) + (", ..." if len(labels) > _SHOWN_LABELS else "")
            where = "model.labels" if given else "the training data"
            raise InvalidConfiguration(
                f"{row.origin}, field {label_field!r}: expected a label of {where} ({shown}), got {row.label!r}",
                hint="list all classes of the federation in model.labels, or correct the row",
            )


def digest_labels(labels: Sequence[str]) -> bytes:
    """SHA-256 over the ordered labels; empty without labels."""
    return digest_items("shelora labels v1", labels) if labels else b""


def _read_file(path: Path, setting: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.is_file():
        raise InvalidConfiguration(
            f"{setting}: expected a file, got {path}, which does not exist",
            hint="relative paths count from the folder of the configuration file",
        )
    suffix = path.suffix.lower()
    try:
        if suffix in (".jsonl", ".ndjson"):
            yield from _read_jsonl(path)
        elif suffix in (".csv", ".tsv"):
            yield from _read_csv(path, "\t" if suffix == ".tsv" else ",")
        elif suffix == ".parquet":
            yield from _read_parquet(path)
        else:
            raise InvalidConfiguration(f"{setting}: expected one of {', '.join(DATA_SUFFIXES)}, got {path.name}")
    except UnicodeDecodeError as error:
        raise InvalidConfiguration(
            f"{path.name}: expected UTF-8, got other bytes ({error.reason})", hint="convert the file to UTF-8"
        ) from error
    except OSError as error:
        raise InvalidConfiguration(f"{setting}: cannot read {path}: {error.strerror or error}") from error


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            origin = f"{path.name}, line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise InvalidConfiguration(f"{origin}: expected one JSON object, got bad JSON ({error})") from error
            if not isinstance(record, dict):
                raise InvalidConfiguration(f"{origin}: expected one JSON object, got {type(record).__name__}")
            yield origin, record


def _read_csv(path: Path, delimiter: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, delimiter=delimiter, strict=True)
        try:
            for record in reader:
                origin = f"{path.name}, line {reader.line_num}"
                if None in record or None in record.values():
                    expected = len(reader.fieldnames or ())
                    raise InvalidConfiguration(
                        f"{origin}: expected {expected} fields as in the header, got another number",
                        hint="put texts that hold the separator into double quotes",
                    )
                yield origin, record
        except csv.Error as error:
            origin = f"{path.name}, line {reader.reader.line_num}"
            raise InvalidConfiguration(f"{origin}: expected valid CSV, got {error}") from error


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as table:
            number = 0
            for batch in table.iter_batches():
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path.name}, row {number}", record
    except ArrowException as error:
        raise InvalidConfiguration(f"{path.name}: expected a Parquet file, got {error}") from error


def _read_dataset(source: str, setting: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of `name` or `name:configuration`; class numbers become class names."""
    import datasets

    name, _, configuration = source.partition(":")
    try:
        loaded = datasets.load_dataset(name, configuration or None, split=split)
    except Exception as error:  # the library raises what its scripts, the hub and the parsers raise
        raise InvalidConfiguration(
            f"{setting}: cannot load data set {source!r}, split {split!r}: {type(error).__name__}: {error}",
            hint=f"name a file ({', '.join(DATA_SUFFIXES)}) or a data set that is cached or can be fetched",
        ) from error
    classes = {key: value for key, value in loaded.features.items() if isinstance(value, datasets.ClassLabel)}
    for number, record in enumerate(loaded, start=1):
        names = {key: value.int2str(record[key]) for key, value in classes.items() if record[key] is not None}
        yield f"{source} [{split}], row {number}", {**record, **names}


def _parse(record: dict[str, Any], origin: str, text_field: str, label_field: str | None) -> Row:
    text = _field(record, origin, text_field)
    if not isinstance(text, str) or not text.strip():
        raise InvalidConfiguration(
            f"{origin}, field {text_field!r}: expected a text, got {_shorten(text)}", hint="remove or complete the row"
        )
    if label_field is None:
        return Row(text, None, origin)
    label = _field(record, origin, label_field)
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        raise InvalidConfiguration(
            f"{origin}, field {label_field!r}: expected a label (text or integer), got {_shorten(label)}",
            hint="remove or complete the row",
        )
    return Row(text, str(label), origin)


def _field(record: dict[str, Any], origin: str, field: str) -> object:
    if field not in record:
        raise InvalidConfiguration(
            f"{origin}: expected field {field!r}, got {', '.join(repr(key) for key in record)}",
            hint="set data.text_field and data.label_field",
        )
    return record[field]


def _shorten(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= _SHOWN_CHARACTERS else shown[:_SHOWN_CHARACTERS] + "..."
