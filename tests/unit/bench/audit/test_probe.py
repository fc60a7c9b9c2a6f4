"""The whole chain on tiny random models: the product's training and wire, then the attackers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench.audit.probe import Probe
from bench.audit.victim import Victim, load_victim
from bench.audit.wire import transmit
from services.client_agent.adapter import AdapterState
from shelora.lora import Adapter
from support.tiny_models import sample_rows, save_model

RANK = 16


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Victim:
    folder = tmp_path_factory.mktemp("victim")
    model = save_model(folder / "model", "bert")
    rows = sample_rows(12)
    labels = sorted({row["label"] for row in rows})
    return load_victim(rows, folder, rank=RANK, labels=labels, source=str(model))


def natural(victim: Victim):
    return [np.arange(shape.in_features) for shape in victim.shapes.modules]


def continued(victim: Victim) -> AdapterState:
    """The start of a later round: B is not 0."""
    generator, first = np.random.default_rng(8), victim.first_start()
    modules = tuple(Adapter(b=generator.normal(size=module.b.shape) * 0.1, a=module.a) for module in first.modules)
    return AdapterState(modules, first.dense)


def test_a_later_start_is_the_average_at_the_own_rank(victim) -> None:
    trained = victim.step(victim.first_start(), range(12))
    later = victim.later_start(trained, victim.trainer.scaling)
    for before, after in zip(trained.modules, later.modules, strict=True):
        expected = before.b @ before.a
        np.testing.assert_allclose(after.b @ after.a, expected, atol=1e-5 * np.abs(expected).max())


def test_the_first_layer_is_attacked(victim) -> None:
    assert [victim.shapes.modules[index].name.split(".")[-1] for index in victim.first] == ["query", "key", "value"]
    assert victim.places


def test_the_aggregator_sees_no_more_than_the_product_sends(victim) -> None:
    start = victim.first_start()
    sent = transmit(victim.step(start, [0]), victim.trainer.scaling, victim.shapes, "25%", natural(victim), 1)
    for sight, order, shape in zip(sent.sights, sent.orders, victim.shapes.modules, strict=True):
        assert sight.right.shape == (RANK, shape.in_features - sight.hidden)
        assert sight.hidden == shape.in_features // 4
        assert sorted(order) == list(range(shape.in_features))
        assert order.tolist() != list(range(shape.in_features))


def test_a_plain_step_leaks_the_text_to_who_knows_order_and_start_and_full_stops_that(victim) -> None:
    start = continued(victim)
    probe = Probe(victim, victim.texts[:1], victim.texts[2:3], np.random.default_rng(0))
    trained = victim.step(start, [0])
    sent = transmit(trained, victim.trainer.scaling, victim.shapes, "0%", natural(victim), 1)
    assert probe.right(sent, start, sent.orders).nearest.recall == 1
    assert probe.right(sent, start).below.recall == 0, "without the order"
    hidden = transmit(trained, victim.trainer.scaling, victim.shapes, "full", natural(victim), 1)
    assert probe.right(hidden, start, hidden.orders).nearest.recall == 0


def test_a_plain_first_step_leaks_the_text_through_left_factors_whatever_is_encrypted(victim) -> None:
    probe = Probe(victim, victim.texts[:1], victim.texts[2:3], np.random.default_rng(0))
    start = victim.first_start()
    sent = transmit(victim.step(start, [0]), victim.trainer.scaling, victim.shapes, "full", natural(victim), 1)
    found = probe.left(sent)
    assert found.nearest.recall == 1
    assert found.below.recall == 1


def test_priorities_are_those_of_the_product(victim) -> None:
    for order, shape in zip(victim.priorities(victim.first_start()), victim.shapes.modules, strict=True):
        assert sorted(order) == list(range(shape.in_features))


def test_losses_come_one_a_text(victim) -> None:
    losses = victim.losses(victim.first_start())
    assert losses.shape == (12,)
    assert (losses > 0).all()


@pytest.mark.parametrize(("architecture", "places"), [("gpt2", True), ("llama", False)])
def test_decoders_leak_alike(tmp_path: Path, architecture, places) -> None:
    model = save_model(tmp_path / "model", architecture)
    victim = load_victim(sample_rows(12), tmp_path, rank=RANK, source=str(model), task="causal-lm")
    assert victim.places is places
    start = continued(victim)
    sent = transmit(victim.step(start, [0]), victim.trainer.scaling, victim.shapes, "0%", natural(victim), 1)
    probe = Probe(victim, victim.texts[:1], victim.texts[2:3], np.random.default_rng(0))
    assert probe.right(sent, start, sent.orders).nearest.recall == 1
    query, key = victim.projections()
    assert query.weight.shape == key.weight.shape == (32, 32)
