from __future__ import annotations

import json
from dataclasses import replace
from itertools import chain

import matplotlib.pyplot as plt
import numpy as np
import pytest

from bench.parity import plots, report
from bench.parity.corpus import load_corpus, shares
from bench.parity.lab import Learner, Model
from bench.parity.scenarios import METHODS, Study, centralised, federated, units
from bench.records import choose
from shelora.lora import Factors


@pytest.fixture(scope="module")
def records(corpus, setting, lab, keys, tmp_path_factory):
    study = Study(setting, corpus, tmp_path_factory.mktemp("study"), lab, keys)
    return {name: list(unit()) for name, unit in units(setting, lambda: study).items()}


def test_every_unit_yields_flat_records_and_the_report_names_every_method(records, setting):
    assert len(records) == len(METHODS) + 1
    found = list(chain.from_iterable(records.values()))
    assert json.loads(json.dumps(found)) == found
    for kind in METHODS.values():
        models = [r for r in report.final_models(found) if r["method"] == kind.name]
        assert [r["rank"] for r in models] == list(setting.ranks)
        assert all(r["texts"] == 12 and 0 <= r["accuracy"] <= 1 and r["sent_bytes"] > 0 for r in models)

    result = {
        "records": records,
        "seconds": dict.fromkeys(records, 1.0),
        "stamp": {"corpus": "animals", "texts": [36, 12], "setting": {"ranks": [2, 4], "rounds": 2, "steps": 3,
                  "batch_size": 4, "curve_texts": 6, "max_tokens": 32, "seeds": [0]}},
        "machine": {"cores": 1, "processor": "some", "memory_bytes": 2**30, "system": "Linux", "python": "3",
                    "numpy": "2", "torch": "2", "grpcio": "1", "openfhe": "1"},
    }  # fmt: skip
    text = report.render(report.sections(result))
    assert all(kind.name in text for kind in METHODS.values())
    figure, axes = plt.subplots()
    for draw in plots.draws(records).values():
        draw(axes)
    plt.close(figure)


def test_the_protocol_gives_what_flexlora_gives_from_the_same_trained_adapters(records):
    same = choose(records["exact-even-0"], beside="FlexLoRA")
    assert len(same) == 4
    assert max(record["update_difference"] for record in same) <= 1e-6
    assert max(abs(record["loss_difference"]) for record in same) <= 1e-5
    assert all(record["accuracy_difference"] == 0 for record in same)


def test_the_first_round_is_trained_once_for_all_methods(study, monkeypatch):
    list(federated(lambda: study, "fedit", "even", 0))
    rounds, train = [], Learner.train

    def count(learner, start, number):
        rounds.append(number)
        return train(learner, start, number)

    monkeypatch.setattr(Learner, "train", count)
    list(federated(lambda: study, "hetlora", "even", 0))
    assert rounds == [2, 2]


def test_a_unit_gives_the_same_records_again(study):
    first = list(federated(lambda: study, "flexlora", "even", 0))
    study.first.clear()
    assert list(federated(lambda: study, "flexlora", "even", 0)) == first


def test_centralised_training_takes_the_steps_of_all_agents_each_smaller(study, setting):
    found = list(centralised(lambda: study, 0))
    assert [record["round"] for record in found] == [1, 2]
    assert found[0]["examples"] == 36
    learner = study.lab.central(0)
    assert learner.steps == setting.steps * len(setting.ranks)
    assert learner.learning_rate == setting.learning_rate / len(setting.ranks)


def test_a_residual_changes_what_a_model_says_and_is_gone_with_the_next(study):
    learner = study.lab.learners(shares(study.lab.labels, 2, None, 0), 0)[0]
    adapter = learner.train(Model(learner.adapter), 1)
    rng = np.random.default_rng(0)
    residual = tuple(rng.normal(size=(m.out_features, m.in_features)) for m in study.lab.shapes.modules)
    before = learner.evaluate(Model(adapter), whole=True)
    changed = learner.evaluate(Model(adapter, residual), whole=True).loss
    assert changed != before.loss
    assert learner.evaluate(Model(adapter), whole=True) == before
    kept = tuple(Factors(whole, np.eye(whole.shape[1])) for whole in residual)
    assert learner.evaluate(Model(replace(adapter, residual=kept)), whole=True).loss == pytest.approx(changed, rel=1e-5)
    assert learner.evaluate(Model(adapter), whole=True) == before


def test_shares_give_every_row_once():
    labels = ["a", "b"] * 50
    for concentration in (None, 0.5):
        found = shares(labels, 4, concentration, 1)
        assert sorted(chain.from_iterable(found)) == list(range(100))
        assert found == shares(labels, 4, concentration, 1)


def test_without_the_reviews_the_demonstration_messages_are_used(tmp_path):
    corpus = load_corpus(tmp_path)
    assert corpus.name == "demo messages"
    assert len(corpus.labels) == 6
