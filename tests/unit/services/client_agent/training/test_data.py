from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from services.client_agent.config import DataSection, ModelSection
from services.client_agent.training import data
from services.client_agent.training.data import Row, collect_labels, digest_labels, load_corpus, pick_evenly, read_rows
from shelora.errors import InvalidConfiguration

RECORDS = [{"text": "one", "label": "b"}, {"text": "two, three", "label": "a"}]


def write(path: Path, content: str) -> str:
    path.write_text(content, encoding="utf-8")
    return str(path)


def read(source: str) -> list[tuple[str, str | None]]:
    return [(row.text, row.label) for row in read_rows(source, "data.train", "train", "text", "label")]


def test_all_formats_give_the_same_rows(tmp_path: Path):
    jsonl = write(tmp_path / "a.jsonl", "\ufeff" + "\n\n".join(json.dumps(record) for record in RECORDS))
    csv = write(tmp_path / "a.csv", 'label,text\nb,one\na,"two, three"\n')
    tsv = write(tmp_path / "a.tsv", "text\tlabel\none\tb\ntwo, three\ta\n")
    parquet = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(RECORDS), parquet)
    expected = [("one", "b"), ("two, three", "a")]
    assert read(jsonl) == read(csv) == read(tsv) == read(str(parquet)) == expected


def test_dataset_labels_become_class_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    made = datasets.Dataset.from_dict({"text": ["one", "two"], "label": [1, 0]}, features=features)
    made.to_parquet(tmp_path / "train.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    asked: list[tuple[Any, ...]] = []
    original = datasets.load_dataset

    def local(name: str, configuration: str | None, *, split: str) -> Any:
        asked.append((name, configuration, split))
        found = original("parquet", data_files={"validation": str(tmp_path / "train.parquet")}, split=split)
        return found.cast(features)

    monkeypatch.setattr(datasets, "load_dataset", local)
    rows = read_rows("owner/reviews:short", "data.test", "validation", "text", "label")
    assert [row.label for row in rows] == ["pos", "neg"]
    assert rows[1].origin == "owner/reviews:short [validation], row 2"
    assert asked == [("owner/reviews", "short", "validation")]


def test_a_data_set_that_cannot_be_had_names_the_setting():
    with pytest.raises(InvalidConfiguration, match=r"data.test: cannot load data set 'owner/never-made', split 'test'"):
        read_rows("owner/never-made", "data.test", "test", "text", "label")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "one", "label": 1}\n{broken', "a.jsonl, line 2: expected one JSON object, got bad JSON"),
        ("a.jsonl", "[1]", "a.jsonl, line 1: expected one JSON object, got list"),
        ("a.jsonl", '{"text": "one"}', "a.jsonl, line 1: expected field 'label', got 'text'"),
        ("a.jsonl", '{"body": "one", "label": 1}', "expected field 'text', got 'body', 'label'"),
        ("a.jsonl", '{"text": " ", "label": 1}', "line 1, field 'text': expected a text, got ' '"),
        ("a.jsonl", '{"text": 5, "label": 1}', "line 1, field 'text': expected a text, got 5"),
        ("a.jsonl", '{"text": "one", "label": true}', "field 'label': expected a label (text or integer), got True"),
        ("a.jsonl", '{"text": "one", "label": 0.5}', "expected a label (text or integer), got 0.5"),
        ("a.jsonl", '{"text": "one", "label": ""}', "expected a label (text or integer), got ''"),
        ("a.jsonl", "\n", "data.train: expected at least one row"),
        ("a.csv", "text,label\none,1\ntwo\n", "a.csv, line 3: expected 2 fields as in the header"),
        ("a.csv", "text,label\none,1,2\n", "a.csv, line 2: expected 2 fields as in the header"),
        ("a.csv", 'text,label\n"one"x,1\n', "a.csv, line 2: expected valid CSV"),
        ("a.parquet", "no parquet", "a.parquet: expected a Parquet file"),
    ],
)
def test_refusals_name_file_line_and_field(tmp_path: Path, name: str, content: str, message: str):
    with pytest.raises(InvalidConfiguration) as caught:
        read(write(tmp_path / name, content))
    assert message in str(caught.value)


def test_unreadable_files_are_named(tmp_path: Path):
    with pytest.raises(InvalidConfiguration, match=r"data.train: expected a file, got .*none.jsonl"):
        read(str(tmp_path / "none.jsonl"))
    latin = tmp_path / "latin.csv"
    latin.write_bytes("text,label\ncaf\xe9,1\n".encode("latin-1"))
    with pytest.raises(InvalidConfiguration, match=r"latin.csv: expected UTF-8"):
        read(str(latin))
    with pytest.raises(InvalidConfiguration, match=r"expected one of .jsonl, .*got a.txt"):
        read(write(tmp_path / "a.txt", "x"))


def test_limits_keep_all_parts_of_a_sorted_file():
    rows = [Row(str(number), str(number // 50), "") for number in range(100)]
    assert [row.text for row in pick_evenly(rows, 4)] == ["0", "25", "50", "75"]
    assert pick_evenly(rows, 100) == pick_evenly(rows, 200) == pick_evenly(rows, None) == rows


def make_corpus(tmp_path: Path, test_label: Any, **model: Any) -> data.Corpus:
    train = write(tmp_path / "train.jsonl", '{"text": "x", "label": 10}\n{"text": "y", "label": 9}\n')
    test = write(tmp_path / "test.jsonl", "\n" + json.dumps({"text": "z", "label": test_label}) + "\n")
    return load_corpus(DataSection(train=train, test=test), ModelSection(**model))


def test_labels_come_from_the_training_data_in_order(tmp_path: Path):
    corpus = make_corpus(tmp_path, "9")
    assert corpus.labels == ("9", "10")
    assert corpus.test[0].label == "9"
    assert collect_labels([Row("", label, "") for label in ("b", "10", "9")]) == ("10", "9", "b")


def test_configured_labels_keep_their_order(tmp_path: Path):
    assert make_corpus(tmp_path, 11, labels=["11", "10", "9"]).labels == ("11", "10", "9")


def test_unknown_labels_are_refused(tmp_path: Path):
    expected = r"test.jsonl, line 2, field 'label': expected a label of the training data \(9, 10\), got '8'"
    with pytest.raises(InvalidConfiguration, match=expected):
        make_corpus(tmp_path, 8)
    with pytest.raises(InvalidConfiguration, match=r"train.jsonl, line 1, .*label of model.labels \(9, 8\), got '10'"):
        make_corpus(tmp_path, 8, labels=["9", "8"])
    with pytest.raises(InvalidConfiguration, match="expected at least 2 different labels"):
        collect_labels([Row("", "only", "")])


def test_causal_data_needs_no_labels(tmp_path: Path):
    train = write(tmp_path / "train.jsonl", '{"text": "x"}\n')
    model = ModelSection(task="causal-lm", source="./model")
    corpus = load_corpus(DataSection(train=train), model)
    assert (corpus.train[0].label, corpus.test, corpus.labels) == (None, (), ())


def test_label_digests_depend_on_order():
    assert digest_labels(("a", "b")) != digest_labels(("b", "a"))
    assert len(digest_labels(("a", "b"))) == 32
    assert digest_labels(()) == b""
