from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench.parity.exchange import Exchange, Keys
from bench.parity.methods import Cohort, FedIt, FlexLora, Flora, HetLora, Ours, OursKeeping, updates_of
from services.client_agent.adapter import AdapterState
from services.client_agent.training.plaintext import average
from shelora.lora import Adapter
from shelora.plan import DenseShape, FederationSeed, ModelShapes, ModuleShape

SHAPES = ModelShapes((ModuleShape("q", 20, 16), ModuleShape("v", 12, 18)), (DenseShape("head", (2, 3)),))
RANKS, SCALINGS, EXAMPLES = (2, 4), (2.0, 0.5), (30, 10)


@pytest.fixture
def cohort() -> Cohort:
    return Cohort(SHAPES, RANKS, SCALINGS, EXAMPLES, FederationSeed(bytes(range(32))), (np.zeros((2, 3)),))


def trained(seed: int = 1) -> list[AdapterState]:
    rng = np.random.default_rng(seed)
    return [
        AdapterState(
            tuple(
                Adapter(rng.normal(size=(shape.out_features, rank)), rng.normal(size=(rank, shape.in_features)))
                for shape in SHAPES.modules
            ),
            (rng.normal(size=(2, 3)),),
        )
        for rank in RANKS
    ]


def best(update: np.ndarray, rank: int) -> np.ndarray:
    left, energy, right = np.linalg.svd(update, full_matrices=False)
    return (left[:, :rank] * energy[:rank]) @ right[:rank]


def test_all_methods_start_alike(cohort):
    for kind in (FedIt, HetLora, FlexLora, Flora):
        for model, rank in zip(kind(cohort).models, RANKS, strict=True):
            assert all(not module.b.any() for module in model.adapter.modules)
            assert all(module.rank == rank for module in model.adapter.modules)
    low, high = (model.adapter.modules[0].a for model in FedIt(cohort).models)
    np.testing.assert_array_equal(low, high[:2])


def test_flexlora_cuts_the_average_of_the_products(cohort):
    states = trained()
    method = FlexLora(cohort)
    method.combine(1, states)

    updates, dense = average(states, SCALINGS, EXAMPLES)
    for model, rank, scaling in zip(method.models, RANKS, SCALINGS, strict=True):
        for found, update in zip(updates_of(model.adapter, scaling), updates, strict=True):
            np.testing.assert_allclose(found, best(update, rank), atol=1e-12)
        np.testing.assert_allclose(model.adapter.dense[0], dense[0])


def test_fedit_averages_the_factors_padded_with_zeros(cohort):
    one, two = trained()
    method = FedIt(cohort)
    method.combine(1, [one, two])

    high = method.models[1].adapter.modules[0]
    np.testing.assert_allclose(high.a[:2], 0.75 * one.modules[0].a + 0.25 * two.modules[0].a[:2])
    np.testing.assert_allclose(high.a[2:], 0.25 * two.modules[0].a[2:])
    np.testing.assert_allclose(method.models[0].adapter.modules[0].b, high.b[:, :2])


def test_hetlora_weighs_by_the_norm_of_the_updates(cohort):
    one, two = trained()
    silent = AdapterState(tuple(Adapter(0 * pair.b, pair.a) for pair in one.modules), one.dense)
    method = HetLora(cohort)
    method.combine(1, [silent, two])

    np.testing.assert_allclose(method.models[1].adapter.modules[0].b, two.modules[0].b)


def test_flora_adds_up_everything_and_starts_again(cohort):
    method = Flora(cohort)
    total: list[np.ndarray] = [np.zeros((20, 16)), np.zeros((12, 18))]
    for number in (1, 2):
        states = trained(number)
        method.combine(number, states)
        total = [one + two for one, two in zip(total, average(states, SCALINGS, EXAMPLES)[0], strict=True)]

    assert method.models[0].residual is not None
    np.testing.assert_allclose(method.models[0].residual[1], total[1], atol=1e-12)
    assert not method.models[0].adapter.modules[1].b.any()
    low = updates_of(method.exported()[0].adapter, SCALINGS[0])
    np.testing.assert_allclose(low[1], best(total[1], 2), atol=1e-12)


@pytest.mark.parametrize("budgets", [("full",), ("50%", "10%"), ("0%", "full")])
def test_ours_equals_flexlora_through_real_encryption(cohort, keys, tmp_path, budgets):
    exchange = Exchange(tmp_path, keys, SHAPES, RANKS, cohort.seed, budgets=budgets)
    ours, clear = Ours(cohort, exchange), FlexLora(cohort)
    states = trained()
    ours.combine(1, states)
    clear.combine(1, states)

    for mine, other, scaling in zip(ours.models, clear.models, SCALINGS, strict=True):
        for one, two in zip(updates_of(mine.adapter, scaling), updates_of(other.adapter, scaling), strict=True):
            assert np.abs(one - two).max() <= 1e-6 * np.abs(two).max()
    assert all(sent > 0 for sent in ours.sent_bytes())


def keeping_exchange(cohort: Cohort, keys: Keys, folder: Path) -> Exchange:
    return Exchange(folder, keys, SHAPES, [max(RANKS)] * len(RANKS), cohort.seed, cap=sum(RANKS))


def test_a_kept_residual_loses_nothing_that_the_highest_rank_holds(cohort, keys, tmp_path):
    """Agents that send back what they were given leave the average as it was, in spite of lower ranks."""
    keeping = OursKeeping(cohort, keeping_exchange(cohort, keys, tmp_path / "one"))
    forgetful = Ours(cohort, Exchange(tmp_path / "two", keys, SHAPES, RANKS, cohort.seed))
    for method in (keeping, forgetful):
        method.combine(1, trained())
    first = keeping.average
    for method in (keeping, forgetful):
        method.combine(2, [model.adapter for model in method.models])

    for before, kept, cut in zip(first, keeping.average, forgetful.average, strict=True):
        unavoidable = np.linalg.norm(best(before, max(RANKS)) - before)
        assert np.linalg.norm(kept - before) <= unavoidable + 1e-5 * np.linalg.norm(before)
        assert np.linalg.norm(cut - before) > 1.1 * unavoidable


def test_working_models_with_a_kept_residual_are_all_the_average_of_the_sent_rank(cohort, keys, tmp_path):
    keeping = OursKeeping(cohort, keeping_exchange(cohort, keys, tmp_path))
    plain = Ours(cohort, Exchange(tmp_path / "plain", keys, SHAPES, RANKS, cohort.seed))
    for method in (keeping, plain):
        method.combine(1, trained())

    for model, rank, scaling in zip(keeping.models, RANKS, SCALINGS, strict=True):
        assert [rest.rank for rest in model.adapter.residual] == ([] if rank == max(RANKS) else [max(RANKS) - rank] * 2)
        for index, (held, whole) in enumerate(zip(updates_of(model.adapter, scaling), keeping.average, strict=True)):
            for rest in model.adapter.residual[index : index + 1]:
                held = held + rest.left @ rest.right
            assert np.abs(held - best(whole, max(RANKS))).max() <= 1e-6 * np.abs(whole).max()  # float32 on the wire
    for model, usual in zip(keeping.exported(), plain.models, strict=True):
        assert model.adapter.residual == ()
        for one, two in zip(model.adapter.modules, usual.adapter.modules, strict=True):
            np.testing.assert_allclose(one.b @ one.a, two.b @ two.a, atol=1e-5)


def test_a_kept_residual_costs_no_ciphertext(cohort, keys, tmp_path):
    """With the basis as large as the trained ranks together, only the factors grow, by what the ranks differ."""
    wide, narrow = keeping_exchange(cohort, keys, tmp_path), Exchange(tmp_path, keys, SHAPES, RANKS, cohort.seed)
    layouts = [exchange.plan.layout(ranks) for exchange, ranks in ((wide, [max(RANKS)] * 2), (narrow, RANKS))]
    assert layouts[0].basis_rows == layouts[1].basis_rows
    keeping, plain = OursKeeping(cohort, wide), Ours(cohort, narrow)
    for method in (keeping, plain):
        method.combine(1, trained())
    more = 4 * sum(module.out_features for module in SHAPES.modules) * (max(RANKS) - RANKS[0])
    assert keeping.sent_bytes()[0] - plain.sent_bytes()[0] == pytest.approx(more, abs=64)  # headers
    assert keeping.sent_bytes()[1] == plain.sent_bytes()[1]
