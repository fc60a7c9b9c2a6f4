from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.client_agent.adapter import AdapterState
from services.client_agent.round import (
    AveragedUpdate,
    LocalUpdate,
    cipher_values,
    factor_tensors,
    local_update,
    open_average,
    refit,
    starting_adapter,
    wire_orders,
)
from shelora.errors import MalformedPayload, NonFiniteValue, ShapeMismatch, ValueOutOfRange
from shelora.he.parameters import CkksParameters
from shelora.lora import Adapter, basis, plain_part, plaintext_average, project
from shelora.plan import (
    DenseShape,
    FederationSeed,
    ModelShapes,
    ModuleShape,
    Negotiation,
    Packing,
    Plan,
    agree_ranges,
    dense_error,
    fresh_rows,
)

SEED = FederationSeed(bytes(range(32)))
SHAPES = ModelShapes((ModuleShape("q", 20, 16), ModuleShape("v", 9, 12)), (DenseShape("head", (2, 3)),))
WIDTHS = tuple(module.in_features for module in SHAPES.modules)
BOUND = 1e-6
"""Factors, basis and projections travel as float32; entries of the tests' averages are of order 1."""


PARAMETERS = CkksParameters(modulus=1152921504606830593)


def make_plan(
    levels: Sequence[Sequence[int]], cap: int = 64, version: int = 1, packing: Packing = Packing.EXACT
) -> Plan:
    per_module = tuple(tuple(sorted({agent[index] for agent in levels})) for index in range(len(SHAPES.modules)))
    return Plan("ward", version, 1, SHAPES, cap, Negotiation.ENCRYPTED, per_module, bytes(32), 64, packing)


@dataclasses.dataclass(frozen=True, eq=False)
class Sender:
    """One agent of a simulated round."""

    rank: int
    columns: tuple[int, ...]
    weight: float
    update: LocalUpdate

    @classmethod
    def random(cls, rng: np.random.Generator, rank: int, columns: tuple[int, ...], weight: float) -> Sender:
        modules = tuple(
            Adapter(rng.normal(size=(shape.out_features, rank)), rng.normal(size=(rank, shape.in_features)))
            for shape in SHAPES.modules
        )
        dense = tuple(rng.normal(size=shape.shape) for shape in SHAPES.dense)
        return cls(rank, columns, weight, local_update(AdapterState(modules, dense), 0.5))


def priorities(rng: np.random.Generator) -> list[np.ndarray]:
    return [rng.permutation(n).astype(np.int64) for n in WIDTHS]


def run_round(
    plan: Plan, senders: Sequence[Sender], counted: Sequence[Sender], orders: Sequence[np.ndarray]
) -> AveragedUpdate:
    """The aggregator's algebra between the agents' functions, with a perfect cipher in place of CKKS."""
    layout = plan.layout([sender.rank for sender in senders])
    sent = {id(sender): factor_tensors(sender.update, orders, sender.columns) for sender in senders}
    published: dict[str, np.ndarray] = {}
    projections: dict[int, dict[str, np.ndarray]] = {id(sender): {} for sender in senders}
    first_plain = [min(sender.columns[index] for sender in counted) for index in range(len(SHAPES.modules))]
    for index, module in enumerate(SHAPES.modules):
        lefts = [sent[id(sender)][f"{index}.left"] for sender in senders]
        common = basis(lefts, [sender.weight for sender in senders], plan.cap).astype(np.float32)
        published[f"{index}.basis"] = common
        plain = np.zeros((common.shape[1], module.in_features))
        found_by = [project(common, left).astype(np.float32) for left in lefts]
        if plan.packing is Packing.DENSE:
            published[f"{index}.range"] = agree_ranges(found_by, [sender.weight for sender in senders])
        for sender, found in zip(senders, found_by, strict=True):
            projections[id(sender)][f"{index}.projection"] = found
            if sender in counted:
                right = sent[id(sender)][f"{index}.right"]
                plain += plain_part(found, right, sender.weight, module.in_features)
        published[f"{index}.plain"] = plain[:, first_plain[index] :].astype(np.float32)
    total = np.zeros(layout.reals(layout.total_slots))
    for sender in counted:
        mine = projections[id(sender)] | {name: found for name, found in published.items() if name.endswith(".range")}
        values = cipher_values(sender.update, orders, sender.columns, mine, sender.weight, layout)
        total[: values.size] += values
    used = layout.reals(max(layout.used_slots(sender.columns) for sender in counted))
    weight = sum(sender.weight for sender in counted)
    return open_average(published, total[:used], orders, layout, first_plain, weight)


def packing_bound(senders: Sequence[Sender], counted: Sequence[Sender]) -> float:
    """What dense packing may add to an entry of a module's average: docs/method.md section 8 with E of all senders."""
    energy = max(
        sum(sender.weight * float(np.linalg.norm(sender.update.factors[index].left)) for sender in senders)
        for index in range(len(SHAPES.modules))
    )
    return 2.0 * dense_error(PARAMETERS, len(counted)) * energy / sum(sender.weight for sender in counted)


def assert_average(opened: AveragedUpdate, counted: Sequence[Sender], packing_error: float = 0.0) -> None:
    weights = [sender.weight for sender in counted]
    for index in range(len(SHAPES.modules)):
        true = plaintext_average([sender.update.factors[index] for sender in counted], weights)
        difference = np.abs(opened.basis[index] @ opened.core[index] - true).max()
        assert difference <= BOUND * max(1.0, np.abs(true).max()) + packing_error
    true_dense = np.average([sender.update.dense[0] for sender in counted], axis=0, weights=weights)
    np.testing.assert_allclose(opened.dense[0], true_dense, atol=1e-12)


@st.composite
def cohorts(draw: st.DrawFn) -> tuple[list[tuple[int, tuple[int, ...], int]], list[bool], int]:
    members = draw(
        st.lists(
            st.tuples(st.integers(1, 5), st.tuples(*(st.integers(0, n) for n in WIDTHS)), st.integers(1, 1000)),
            min_size=2,
            max_size=5,
        )
    )
    counted = draw(st.lists(st.booleans(), min_size=len(members), max_size=len(members)).filter(any))
    return members, counted, draw(st.integers(0, 2**32 - 1))


@given(cohorts(), st.sampled_from(Packing))
def test_a_round_averages_the_members_that_count(cohort, packing):
    members, flags, entropy = cohort
    rng = np.random.default_rng(entropy)
    total = sum(examples for _, _, examples in members)
    senders = [Sender.random(rng, rank, columns, examples / total) for rank, columns, examples in members]
    counted = [sender for sender, flag in zip(senders, flags, strict=True) if flag]
    plan = make_plan([sender.columns for sender in senders], packing=packing)
    orders = wire_orders(SEED, plan, 3, priorities(rng))
    bound = packing_bound(senders, counted) if packing is Packing.DENSE else 0.0
    assert_average(run_round(plan, senders, counted, orders), counted, bound)


def test_orders_are_secret_fresh_and_put_the_priority_first():
    rng = np.random.default_rng(1)
    first = priorities(rng)
    plan = make_plan([(4, 3), (10, 12)])
    orders = wire_orders(SEED, plan, 1, first)
    for order, priority, levels, n in zip(orders, first, plan.levels, WIDTHS, strict=True):
        assert sorted(order.tolist()) == list(range(n))
        for level in levels:
            assert set(order[:level].tolist()) == set(priority[:level].tolist())
    again = wire_orders(SEED, plan, 1, first)
    for one, other in zip(orders, again, strict=True):
        np.testing.assert_array_equal(one, other)
    for another in (
        wire_orders(SEED, plan, 2, first),
        wire_orders(SEED, make_plan([(4, 3), (10, 12)], version=2), 1, first),
        wire_orders(FederationSeed(bytes(32)), plan, 1, first),
    ):
        assert any((one != two).any() for one, two in zip(orders, another, strict=True))


def test_the_factors_payload_holds_no_encrypted_column():
    rng = np.random.default_rng(2)
    sender = Sender.random(rng, 3, (16, 5), 1.0)
    orders = wire_orders(SEED, make_plan([sender.columns]), 1, priorities(rng))
    tensors = factor_tensors(sender.update, orders, sender.columns)
    assert {name: (tensor.dtype.name, tensor.shape) for name, tensor in tensors.items()} == {
        "0.left": ("float32", (20, 3)),
        "0.right": ("float32", (3, 0)),
        "1.left": ("float32", (9, 3)),
        "1.right": ("float32", (3, 7)),
    }
    true = sender.update.factors[1].right.astype(np.float32)
    np.testing.assert_array_equal(tensors["1.right"], true[:, orders[1][5:]])


def test_refit_is_the_best_fit_of_the_own_rank_and_nests():
    rng = np.random.default_rng(3)
    senders = [Sender.random(rng, rank, WIDTHS, 0.5) for rank in (4, 3)]
    plan = make_plan([WIDTHS])
    opened = run_round(plan, senders, senders, wire_orders(SEED, plan, 1, priorities(rng)))
    for rank, scaling in ((2, 2.0), (4, 0.25)):
        fitted = refit(opened.modules, opened.dense, SEED, plan, 1, rank, scaling)
        fitted.check(SHAPES, rank)
        for index, module in enumerate(fitted.modules):
            whole = opened.basis[index] @ opened.core[index]
            left, energy, right = np.linalg.svd(whole, full_matrices=False)
            best = (left[:, :rank] * energy[:rank]) @ right[:rank]
            np.testing.assert_allclose(scaling * module.b @ module.a, best, atol=BOUND)
        np.testing.assert_array_equal(fitted.dense[0], opened.dense[0])


def kept_senders(senders: Sequence[Sender], opened: AveragedUpdate, plan: Plan, sent: int) -> list[Sender]:
    """Agents of ranks 1 and 2 that train nothing and send what they were given, adapter and residual."""
    found = []
    for sender, rank, scaling in zip(senders, (1, 2), (2.0, 0.25), strict=True):
        state = refit(opened.modules, opened.dense, SEED, plan, 1, rank, scaling, sent)
        state.check(SHAPES, rank)
        update = local_update(state, scaling, state.residual, sent)
        found.append(dataclasses.replace(sender, rank=sent, update=update))
    return found


@pytest.mark.parametrize("columns", [WIDTHS, (4, 3)], ids=["full", "partly"])
def test_untrained_agents_of_small_ranks_give_the_average_back(columns):
    """The fixed point: no cut takes anything while the sent rank holds the average, to float32 on the wire."""
    rng = np.random.default_rng(9)
    senders = [Sender.random(rng, rank, columns, 0.5) for rank in (4, 3)]
    plan = make_plan([columns])
    first = run_round(plan, senders, senders, wire_orders(SEED, plan, 1, priorities(rng)))
    again = kept_senders(senders, first, plan, 7)
    second = run_round(plan, again, again, wire_orders(SEED, plan, 2, priorities(rng)))
    for index in range(len(SHAPES.modules)):
        before, after = (opened.basis[index] @ opened.core[index] for opened in (first, second))
        np.testing.assert_allclose(after, before, atol=BOUND * np.abs(before).max())
    cut = kept_senders(senders, first, plan, 3)
    third = run_round(plan, cut, cut, wire_orders(SEED, plan, 2, priorities(rng)))
    for index in range(len(SHAPES.modules)):
        whole = first.basis[index] @ first.core[index]
        left, energy, right = np.linalg.svd(whole, full_matrices=False)
        best = (left[:, :3] * energy[:3]) @ right[:3]
        np.testing.assert_allclose(third.basis[index] @ third.core[index], best, atol=BOUND * np.abs(whole).max())


def test_a_refit_with_a_sent_rank_has_the_usual_adapter_and_the_rest_beside_it():
    rng = np.random.default_rng(10)
    senders = [Sender.random(rng, rank, WIDTHS, 0.5) for rank in (2, 2)]
    plan = make_plan([WIDTHS])
    opened = run_round(plan, senders, senders, wire_orders(SEED, plan, 1, priorities(rng)))
    usual = refit(opened.modules, opened.dense, SEED, plan, 1, 2, 2.0)
    same = refit(opened.modules, opened.dense, SEED, plan, 1, 2, 2.0, 2)
    wide = refit(opened.modules, opened.dense, SEED, plan, 1, 2, 2.0, 9)
    assert usual.residual == same.residual == ()
    for index, (one, two, three) in enumerate(zip(usual.modules, same.modules, wide.modules, strict=True)):
        np.testing.assert_array_equal(one.a, two.a)
        np.testing.assert_array_equal(one.b, two.b)
        np.testing.assert_allclose(three.a, one.a, atol=1e-12)
        np.testing.assert_allclose(three.b, one.b, atol=1e-12)
        rest = wide.residual[index]
        assert rest.rank == 2  # what two agents of rank 2 give has rank 4; no made-up directions
        held = 2.0 * three.b @ three.a + rest.left @ rest.right
        np.testing.assert_allclose(held, opened.basis[index] @ opened.core[index], atol=BOUND)


def test_a_first_round_with_a_sent_rank_sends_zeros_for_what_is_not_there():
    rng = np.random.default_rng(11)
    plan = make_plan([(4, 3)])
    state = starting_adapter(SEED, plan, 2, (np.zeros((2, 3)),))
    trained = AdapterState(
        tuple(Adapter(rng.normal(size=module.b.shape), module.a) for module in state.modules), state.dense
    )
    usual, wide = local_update(trained, 0.5), local_update(trained, 0.5, (), 5)
    for one, two in zip(usual.factors, wide.factors, strict=True):
        assert two.rank == 5
        np.testing.assert_allclose(two.left[:, :2], one.left, atol=1e-12)
        np.testing.assert_allclose(two.right[:2], one.right, atol=1e-12)
        assert not two.left[:, 2:].any()
        assert not two.right[2:].any()
    narrow = Sender(2, (4, 3), 0.5, usual)
    padded = Sender(5, (4, 3), 0.5, wide)
    orders = wire_orders(SEED, plan, 1, priorities(rng))
    for packing in Packing:
        packed = dataclasses.replace(plan, packing=packing)
        bound = packing_bound([narrow, padded], [narrow, padded]) if packing is Packing.DENSE else 0.0
        assert_average(run_round(packed, [narrow, padded], [narrow, padded], orders), [narrow, padded], bound)


def test_directions_that_the_average_lacks_get_seeded_rows():
    """Two agents of rank 1 leave a rank-5 agent three directions that only float32 noise fills: they start afresh."""
    rng = np.random.default_rng(4)
    senders = [Sender.random(rng, 1, (3, 12), 0.5) for _ in range(2)]
    plan = make_plan([(3, 12)])
    opened = run_round(plan, senders, senders, wire_orders(SEED, plan, 7, priorities(rng)))
    fitted = refit(opened.modules, opened.dense, SEED, plan, 7, 5, 1.0)
    for module, shape in zip(fitted.modules, SHAPES.modules, strict=True):
        rows = fresh_rows(SEED, plan.federation, plan.epoch, shape.name, 7, 5, shape.in_features)
        np.testing.assert_array_equal(module.a[2:], rows[2:])
        assert not module.b[:, 2:].any()
        assert module.b[:, :2].any(axis=0).all()


def test_noise_of_float32_is_no_direction():
    """Agents of rank 3 whose updates have rank 1 alone: what rounding adds must not become adapter rows."""
    rng = np.random.default_rng(5)
    b, a = rng.normal(size=(20, 1)), rng.normal(size=(1, 16))
    modules = (
        Adapter(np.repeat(b, 3, axis=1), np.repeat(a, 3, axis=0)),
        Adapter(np.zeros((9, 3)), rng.normal(size=(3, 12))),
    )
    update = local_update(AdapterState(modules, (np.zeros((2, 3)),)), 1.0)
    senders = [Sender(3, (2, 2), 0.5, update) for _ in range(2)]
    plan = make_plan([(2, 2)])
    opened = run_round(plan, senders, senders, wire_orders(SEED, plan, 1, priorities(rng)))
    fitted = refit(opened.modules, opened.dense, SEED, plan, 1, 3, 1.0)
    assert not fitted.modules[0].b[:, 1:].any()
    assert not fitted.modules[1].b.any()


def test_the_start_is_the_same_for_all_and_nests():
    plan = make_plan([WIDTHS])
    dense = (np.ones((2, 3)),)
    large, small = starting_adapter(SEED, plan, 6, dense), starting_adapter(SEED, plan, 2, dense)
    for one, other in zip(large.modules, small.modules, strict=True):
        assert not one.b.any()
        np.testing.assert_array_equal(one.a[:2], other.a)
        assert np.unique(one.a).size == one.a.size


@pytest.fixture
def opening():
    """Arguments of open_average for one sender."""
    rng = np.random.default_rng(6)
    plan = make_plan([(4, 4)])
    layout = plan.layout([2])
    orders = wire_orders(SEED, plan, 1, priorities(rng))
    tensors = {}
    for index, module in enumerate(SHAPES.modules):
        tensors[f"{index}.basis"] = np.linalg.qr(rng.normal(size=(module.out_features, 2)))[0].astype(np.float32)
        tensors[f"{index}.plain"] = rng.normal(size=(2, module.in_features - 4)).astype(np.float32)
    return tensors, np.zeros(layout.used_slots((4, 4))), orders, layout, (4, 4), 1.0


def test_a_published_average_that_does_not_fit_is_refused(opening):
    tensors, values, orders, layout, first_plain, weight = opening
    open_average(tensors, values, orders, layout, first_plain, weight)
    lacking = {name: tensor for name, tensor in tensors.items() if name != "1.plain"}
    with pytest.raises(MalformedPayload, match=r"lacks tensor '1\.plain'"):
        open_average(lacking, values, orders, layout, first_plain, weight)
    with pytest.raises(MalformedPayload, match="first plain column of 2 modules, got 1"):
        open_average(tensors, values, orders, layout, first_plain[:1], weight)
    with pytest.raises(ShapeMismatch, match=r"expected shape \(2, 13\), got \(2, 12\)"):
        open_average(tensors, values, orders, layout, (3, 4), weight)
    with pytest.raises(NonFiniteValue, match=r"0\.basis"):
        open_average({**tensors, "0.basis": np.full((20, 2), np.nan)}, values, orders, layout, first_plain, weight)


def test_a_projection_that_does_not_fit_is_refused():
    rng = np.random.default_rng(7)
    sender = Sender.random(rng, 2, (4, 4), 1.0)
    plan = make_plan([(4, 4)])
    orders = wire_orders(SEED, plan, 1, priorities(rng))
    layout = plan.layout([2])
    good = {f"{index}.projection": np.eye(2, dtype=np.float32) for index in range(2)}
    values = cipher_values(sender.update, orders, sender.columns, good, 0.5, layout)
    assert values.shape == (layout.used_slots((4, 4)),)
    with pytest.raises(MalformedPayload, match="projection"):
        cipher_values(sender.update, orders, sender.columns, {}, 0.5, layout)
    with pytest.raises(ShapeMismatch, match=r"expected shape \(2, 2\)"):
        cipher_values(sender.update, orders, sender.columns, {**good, "1.projection": np.eye(3)}, 0.5, layout)


def test_dense_packing_needs_ranges_that_hold_the_own_part():
    rng = np.random.default_rng(8)
    sender = Sender.random(rng, 2, (4, 4), 1.0)
    plan = make_plan([(4, 4)], packing=Packing.DENSE)
    orders = wire_orders(SEED, plan, 1, priorities(rng))
    layout = plan.layout([2])
    answer = {f"{index}.projection": np.eye(2, dtype=np.float32) for index in range(2)}
    ranges = {f"{index}.range": np.ones(2, dtype=np.float32) for index in range(2)}
    values = cipher_values(sender.update, orders, sender.columns, answer | ranges, 0.5, layout)
    assert values.shape == (layout.reals(layout.used_slots((4, 4))),)
    with pytest.raises(MalformedPayload, match="range"):
        cipher_values(sender.update, orders, sender.columns, answer, 0.5, layout)
    wrong = answer | ranges | {"0.range": np.ones(3, dtype=np.float32)}
    with pytest.raises(ShapeMismatch, match=r"expected shape \(2,\)"):
        cipher_values(sender.update, orders, sender.columns, wrong, 0.5, layout)
    small = answer | ranges | {"1.range": np.full(2, 0.25, dtype=np.float32)}
    with pytest.raises(ValueOutOfRange, match="hold the own part"):
        cipher_values(sender.update, orders, sender.columns, small, 0.5, layout)
    hostile = dataclasses.replace(sender.update.factors[0], right=sender.update.factors[0].right * 50)
    poisoned = LocalUpdate((hostile, sender.update.factors[1]), sender.update.dense)
    with pytest.raises(ValueOutOfRange, match="values within the norm of the row"):
        cipher_values(poisoned, orders, sender.columns, answer | ranges, 0.5, layout)
