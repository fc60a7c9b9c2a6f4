"""A tiny encoder and tiny texts: what every test of the parity measurement trains."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.parity.corpus import Corpus, read_corpus
from bench.parity.exchange import Keys, draw_keys
from bench.parity.lab import Lab
from bench.parity.scenarios import Study
from bench.parity.setting import Setting
from support.tiny_models import sample_rows, save_model, write_jsonl


@pytest.fixture(scope="session")
def keys() -> Keys:
    return draw_keys(1)


@pytest.fixture(scope="session")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    source = save_model(tmp_path_factory.mktemp("tiny") / "bert", "bert")
    return Setting(
        ranks=(2, 4),
        rounds=2,
        steps=3,
        batch_size=4,
        learning_rate=0.01,
        curve_texts=6,
        seeds=(0,),
        concentrations={"even": None},
        source=str(source),
    )


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("texts")
    train = write_jsonl(folder / "train.jsonl", sample_rows(36))
    return read_corpus("animals", train, write_jsonl(folder / "test.jsonl", sample_rows(12)))


@pytest.fixture(scope="session")
def lab(corpus: Corpus, setting: Setting) -> Lab:
    return Lab(corpus, setting, 2)


@pytest.fixture
def study(corpus: Corpus, setting: Setting, lab: Lab, keys: Keys, tmp_path: Path) -> Study:
    return Study(setting, corpus, tmp_path, lab, keys)
