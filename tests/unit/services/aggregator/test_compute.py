from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace

import anyio
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from services.aggregator import compute as compute_module
from services.aggregator.compute import LocalCompute
from services.aggregator.domain import CohortMember
from services.client_agent.round import open_average
from services.common.blobs import Blob, DirectoryBlobStore
from services.common.threads import WorkerPool
from shelora.errors import InternalFault, StoredBytesCorrupt, UnknownBlob
from shelora.lora import basis, plaintext_average
from shelora.plan import ColumnVote, ModelShapes, ModuleShape, Negotiation, Packing, dense_error, rank_tokens
from support.updates import PARAMETERS, SHAPES, Contribution, make_plan, open_residues, orders

BUDGETS = [(40, 25), (10, 6), (20, 13)]
FLOAT32_ROUNDING = 3e-6


def cohort_of(seed: int, ranks=(4, 2, 8), budgets=BUDGETS, examples=(30, 50, 20)):
    rng = np.random.default_rng(seed)
    return [
        Contribution.random(rng, f"agent-{index}", rank, columns, count)
        for index, (rank, columns, count) in enumerate(zip(ranks, budgets, examples, strict=True))
    ]


async def stored_members(blobs, plan, cohort):
    total = sum(member.examples for member in cohort)
    return [
        CohortMember(
            agent=member.agent,
            rank=member.rank,
            columns=member.columns,
            weight=member.examples / total,
            examples=member.examples,
            factors=await blobs.write(f"factors-{member.agent}", [member.factors(plan)]),
        )
        for member in cohort
    ]


def load(blobs, blob: Blob):
    return safetensors.numpy.load(blobs.path(blob.key).read_bytes())


async def run_round(blobs, compute, plan, cohort, counted):
    """A whole round over the real computations; returns the opened average of the counted members."""
    members = await stored_members(blobs, plan, cohort)
    result = await compute.compute_basis(plan, members, "round-1")
    members = [replace(member, projection=result.projections[member.agent]) for member in members]
    ranks = [member.rank for member in cohort]
    layout = plan.layout(ranks)
    chosen = [index for index, member in enumerate(members) if member.agent in counted]
    terms = []
    for index in chosen:
        projection = blobs.path(members[index].projection.key).read_bytes()
        payload = cohort[index].ciphertext(plan, ranks, projection, members[index].weight)
        assert len(payload) == layout.blocks(cohort[index].columns) * PARAMETERS.block_bytes
        terms.append(await blobs.write(f"cipher-{index}", [payload]))
    largest = [max(cohort[index].columns[module] for index in chosen) for module in range(len(SHAPES.modules))]
    blocks = layout.blocks(largest)
    total = await compute.fold_residues(None, terms[:1], blocks, PARAMETERS, "sum-1")
    total = await compute.fold_residues(total, terms[1:], blocks, PARAMETERS, "sum-2")
    average = await compute.compute_average(plan, result.basis, [members[index] for index in chosen], "average")
    used = min(blocks * PARAMETERS.values_per_block, layout.reals(layout.total_slots))
    return open_average(
        load(blobs, average),
        open_residues(blobs.path(total.key).read_bytes(), used),
        orders(plan),
        layout,
        [min(cohort[index].columns[module] for index in chosen) for module in range(len(SHAPES.modules))],
        sum(members[index].weight for index in chosen),
    )


def packing_bound(plan, cohort, counted_examples, index):
    """docs/method.md section 8; this file's cipher has no noise, the real parameters' is allowed for."""
    if plan.packing is Packing.EXACT:
        return 0.0
    energy = sum(member.examples * np.linalg.norm(member.update.factors[index].left) for member in cohort)
    return 2.0 * dense_error(PARAMETERS, len(counted_examples)) * energy / sum(counted_examples)


@pytest.mark.parametrize("counted", [{"agent-0", "agent-1", "agent-2"}, {"agent-1", "agent-2"}])
@pytest.mark.parametrize("batch_values", [0, compute_module.BATCH_VALUES])
@pytest.mark.parametrize("packing", Packing)
@pytest.mark.parametrize("grain", [0, compute_module.GRAIN])
async def test_round_equals_the_plaintext_average_of_the_counted_members(
    blobs, pool, monkeypatch, counted, batch_values, packing, grain
):
    monkeypatch.setattr(compute_module, "GRAIN", grain)
    plan, cohort = make_plan(BUDGETS, packing=packing), cohort_of(7)

    opened = await run_round(blobs, LocalCompute(blobs, pool, batch_values), plan, cohort, counted)

    chosen = [member for member in cohort if member.agent in counted]
    weights = [member.examples for member in chosen]
    for index in range(len(SHAPES.modules)):
        wanted = plaintext_average([member.update.factors[index] for member in chosen], weights)
        error = np.abs(opened.basis[index] @ opened.core[index] - wanted).max()
        assert error <= FLOAT32_ROUNDING * np.abs(wanted).max() + packing_bound(plan, cohort, weights, index)
    dense = sum(weight * member.update.dense[0] for weight, member in zip(weights, chosen, strict=True))
    np.testing.assert_allclose(opened.dense[0], dense / sum(weights), atol=1e-9)


async def test_capped_basis_is_near_the_best_truncation(blobs, pool):
    plan, cohort = make_plan(BUDGETS, cap=8), cohort_of(3)

    opened = await run_round(blobs, LocalCompute(blobs, pool), plan, cohort, {member.agent for member in cohort})

    for index in range(len(SHAPES.modules)):
        assert opened.basis[index].shape[1] == 8
        wanted = plaintext_average([m.update.factors[index] for m in cohort], [m.examples for m in cohort])
        error = np.linalg.norm(opened.basis[index] @ opened.core[index] - wanted)
        best = np.sqrt(np.sum(np.linalg.svd(wanted, compute_uv=False)[8:] ** 2))
        assert error < 1.25 * best


async def test_same_inputs_give_the_same_bytes(blobs, pool):
    plan, compute = make_plan(BUDGETS), LocalCompute(blobs, pool)
    members = await stored_members(blobs, plan, cohort_of(5))

    first = await compute.compute_basis(plan, members, "a")
    second = await compute.compute_basis(plan, members, "b")

    assert first.basis.digest == second.basis.digest
    for agent, blob in first.projections.items():
        assert blob.digest == second.projections[agent].digest


async def test_results_have_the_documented_tensors(blobs, pool):
    plan, compute = make_plan(BUDGETS), LocalCompute(blobs, pool)
    members = await stored_members(blobs, plan, cohort_of(5))

    result = await compute.compute_basis(plan, members, "round-1")
    members = [replace(member, projection=result.projections[member.agent]) for member in members]
    average = await compute.compute_average(plan, result.basis, members[1:], "average")

    assert result.basis.key == "round-1/basis.safetensors"
    assert result.projections["agent-2"].key == "round-1/projection-agent-2.safetensors"
    shapes = {name: (tensor.shape, str(tensor.dtype)) for name, tensor in load(blobs, average).items()}
    assert shapes == {
        "0.basis": ((24, 14), "float32"),
        "0.plain": ((14, 30), "float32"),
        "1.basis": ((16, 14), "float32"),
        "1.plain": ((14, 19), "float32"),
    }


async def test_dense_packing_publishes_the_ranges_it_answered(blobs, pool):
    plan, compute = make_plan(BUDGETS, packing=Packing.DENSE), LocalCompute(blobs, pool)
    members = await stored_members(blobs, plan, cohort_of(5))

    result = await compute.compute_basis(plan, members, "round-1")
    members = [replace(member, projection=result.projections[member.agent]) for member in members]
    average = load(blobs, await compute.compute_average(plan, result.basis, members[1:], "average"))

    answers = [load(blobs, member.projection) for member in members]
    for index in range(len(SHAPES.modules)):
        ranges = average[f"{index}.range"]
        assert (ranges.shape, str(ranges.dtype)) == ((14,), "float32")
        rows = [np.linalg.norm(answer[f"{index}.projection"], axis=1) for answer in answers]
        sums = sum(member.weight * row for member, row in zip(members, rows, strict=True))
        np.testing.assert_array_equal(ranges, 2.0 ** np.ceil(np.log2(sums)))
        for answer in answers:
            np.testing.assert_array_equal(answer[f"{index}.range"], ranges)


async def test_all_agents_full_leaves_no_plain_columns(blobs, pool):
    full = [(40, 25)] * 3
    plan, cohort = make_plan(full, negotiation=Negotiation.NONE), cohort_of(11, budgets=full)

    opened = await run_round(blobs, LocalCompute(blobs, pool), plan, cohort, {"agent-0", "agent-1", "agent-2"})

    wanted = plaintext_average([m.update.factors[0] for m in cohort], [m.examples for m in cohort])
    np.testing.assert_allclose(opened.basis[0] @ opened.core[0], wanted, atol=FLOAT32_ROUNDING * np.abs(wanted).max())


async def test_damaged_or_missing_factors_stop_the_computation(blobs, pool):
    plan, compute = make_plan(BUDGETS), LocalCompute(blobs, pool)
    members = await stored_members(blobs, plan, cohort_of(5))
    path = blobs.path(members[1].factors.key)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    with pytest.raises(StoredBytesCorrupt, match="factors-agent-1"):
        await compute.compute_basis(plan, members, "round-1")
    assert blobs.keys("round-1") == []

    path.unlink()
    with pytest.raises(UnknownBlob):
        await compute.compute_basis(plan, members, "round-1")
    with pytest.raises(UnknownBlob, match="agent-1"):
        await compute.compute_basis(plan, [members[0], replace(members[1], factors=None)], "round-1")


async def test_a_decomposition_that_fails_is_an_internal_fault(blobs, pool, monkeypatch):
    def diverge(*_arguments):
        raise np.linalg.LinAlgError("SVD did not converge")

    plan, compute = make_plan(BUDGETS), LocalCompute(blobs, pool)
    members = await stored_members(blobs, plan, cohort_of(5))
    monkeypatch.setattr(compute_module, "basis", diverge)

    with pytest.raises(InternalFault, match=r"basis of encoder\.(query|value)"):
        await compute.compute_basis(plan, members, "round-1")


@pytest.mark.parametrize("failing", [0, 1])
async def test_a_failing_module_ends_the_steps_of_the_others(blobs, pool, monkeypatch, failing):
    """The module that fails is late, so that results before and behind it are ready or wait for it."""
    plan, compute = make_plan(BUDGETS), LocalCompute(blobs, pool)
    members = await stored_members(blobs, plan, cohort_of(5))
    widths = [module.out_features for module in plan.shapes.modules]
    assert len(set(widths)) == len(widths)

    def late(lefts, *rest):
        if len(lefts[0]) == widths[failing]:
            time.sleep(0.05)
            raise np.linalg.LinAlgError("SVD did not converge")
        return basis(lefts, *rest)

    monkeypatch.setattr(compute_module, "basis", late)
    with anyio.fail_after(20), pytest.raises(InternalFault, match="decomposition"):
        await compute.compute_basis(plan, members, "round-1")
    assert blobs.keys("round-1") == []


async def test_modules_are_written_in_order_and_never_pile_up(blobs, pool, monkeypatch):
    """The first of many modules is the slowest: no more than a result a thread and one more wait for it."""
    shapes = ModelShapes(tuple(ModuleShape(f"m{index}", 8, 8) for index in range(12)), ())
    plan = replace(make_plan(BUDGETS), shapes=shapes, levels=((0,),) * 12)
    compute, ended = LocalCompute(blobs, pool), []
    tensors = {f"{index}.left": np.full((8, 1), index + 1.0, np.float32) for index in range(12)}
    tensors |= {f"{index}.right": np.full((1, 8), 0.1, np.float32) for index in range(12)}
    stored = await blobs.write("factors", [safetensors.numpy.save(tensors)])
    released = threading.Event()

    def slow(lefts, *_rest):
        index = int(lefts[0][0, 0]) - 1
        if index == 0:
            assert released.wait(20)
        ended.append(index)
        return np.full((8, 1), index / 16)

    monkeypatch.setattr(compute_module, "basis", slow)
    running = asyncio.ensure_future(
        compute.compute_basis(plan, [CohortMember("a", 1, (0,) * 12, 1.0, 1, stored)], "round-1")
    )
    await asyncio.sleep(0.3)
    waiting = len(ended)
    released.set()
    result = await running

    assert waiting <= pool.threads
    directions = load(blobs, result.basis)
    assert [directions[f"{index}.basis"][0, 0] for index in range(12)] == [index / 16 for index in range(12)]


async def test_stored_tensors_of_another_plan_are_reported_as_corrupt(blobs, pool):
    plan, compute = make_plan(BUDGETS), LocalCompute(blobs, pool)
    members = await stored_members(blobs, plan, cohort_of(5))
    wrong = [members[0], replace(members[1], rank=5)]

    with pytest.raises(StoredBytesCorrupt, match="expected shape"):
        await compute.compute_basis(plan, wrong, "round-1")


async def test_average_needs_projections(blobs, pool):
    plan, compute = make_plan(BUDGETS), LocalCompute(blobs, pool)
    members = await stored_members(blobs, plan, cohort_of(5))
    result = await compute.compute_basis(plan, members, "round-1")

    with pytest.raises(UnknownBlob, match="projection of agent-0"):
        await compute.compute_average(plan, result.basis, members, "average")


votes_of_agents = st.lists(
    st.tuples(
        st.permutations(range(40)).map(lambda tokens: tokens[:10]),
        st.permutations(range(25)).map(lambda tokens: tokens[:6]),
        st.lists(st.integers(0, 5), min_size=16, max_size=16),
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=20)
@given(votes_of_agents)
def test_ranking_equals_the_methods_rule(tmp_path_factory, agents):
    blobs = DirectoryBlobStore(tmp_path_factory.mktemp("votes"))
    plan = make_plan([(10, 6), (40, 25)], negotiation=Negotiation.OPE)

    async def rank():
        stored = []
        for index, (first, second, scores) in enumerate(agents):
            tensors = {"0.token": first, "0.score": scores[:10], "1.token": second, "1.score": scores[10:]}
            arrays = {name: np.array(values, dtype=np.int64) for name, values in tensors.items()}
            stored.append(await blobs.write(f"votes-{index}", [safetensors.numpy.save(arrays)]))
        return await LocalCompute(blobs, WorkerPool(1)).rank_votes(plan, stored, (10, 6), "ranking")

    ranking = load(blobs, anyio.run(rank))

    for module, limit in enumerate((10, 6)):
        votes = [
            [ColumnVote(t, s) for t, s in zip(agent[module], agent[2][module * 10 :], strict=False)] for agent in agents
        ]
        assert ranking[f"{module}.token"].tolist() == rank_tokens(votes, limit)
        assert ranking[f"{module}.token"].dtype == np.int64
