"""The aggregator's bytes by hand, its memory against its own computations."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy

from services.aggregator import compute as compute_module
from services.aggregator import residue_sums
from services.aggregator.compute import LocalCompute
from services.aggregator.config import AggregatorConfig
from services.aggregator.domain import CohortMember
from services.common.blobs import DirectoryBlobStore
from services.common.threads import WorkerPool
from services.operators.planning import USUAL_PARAMETERS, Participant, Rates, Terms, explain, imagine, parse_shapes
from services.operators.planning import aggregator as planned
from shelora.plan import Negotiation, Packing, Plan

SHAPES = parse_shapes("2*64x48,dense*100")


def test_the_planner_knows_the_aggregator_s_limits() -> None:
    assert planned.BATCH_VALUES == compute_module.BATCH_VALUES
    assert AggregatorConfig.model_fields["compute_threads"].default == planned.THREADS
    assert planned.BLOCKS_AT_ONCE * USUAL_PARAMETERS.block_bytes == residue_sums.STRETCH_BYTES


def test_bytes_by_hand() -> None:
    """Ranks 4 and 8: s = 12. 2 x 12 x 48 + 100 slots fit one block."""
    found = explain(SHAPES, [Participant("a", 4, "", (48, 48)), Participant("b", 8, "", (12, 12))])
    cost = found.aggregator
    factors = 4 * 2 * (64 * 4) + 4 * 2 * (64 * 8 + 8 * 36)
    block, basis, plain = 65_536, 4 * 2 * 64 * 12, 4 * 2 * 12 * 36
    projections = 4 * 2 * 12 * (4 + 8)
    assert cost.in_bytes == factors + 2 * block
    assert cost.out_bytes == 2 * (basis + plain + block) + projections
    assert cost.kept_bytes == basis + plain + block
    assert cost.staged_bytes == factors + 2 * block + projections + basis + (basis + plain) + 2 * block


def test_seconds_by_hand() -> None:
    rates = Rates(
        decompose_flops_per_s=1e6,
        multiply_flops_per_s=1e7,
        memory_values_per_s=1e5,
        digest_bytes_per_s=1e6,
        call_s=0.25,
        file_s=2.0,
    )
    participants = [Participant(name, 4, "", (48, 48)) for name in "ab"]
    cost = explain(SHAPES, participants, rates=Rates(), aggregator_rates=rates).aggregator
    svd = (6 * 64 * 64 + 8 * 512) * (8 + 64) / 8 / 1e6
    assert cost.basis_s == pytest.approx(2 * (2 * 0.25 + 0.5 * 64 * 8 / 1e5 + svd))
    assert cost.projection_s == pytest.approx(2 * (2.0 + 2 * (0.25 + 0.5 * 8 * 64 / 1e5)) + 2 * 2 * 8 * 64 * 8 / 1e7)
    factors, cipher = 2 * 4 * 2 * 64 * 4, 2 * 65_536
    assert cost.average_s == pytest.approx(2 * (2.0 + 2 * (0.25 + 8 * 48 / 1e5)) + factors / 1e6)
    assert cost.sum_s == pytest.approx((cipher + 2.5 * 65_536) / 1e6), "both ciphertexts, and one sum that is written"
    assert cost.check_s == pytest.approx(1.5 * (factors + cipher) / 1e6)
    assert cost.cpu_s == pytest.approx(cost.basis_s + cost.projection_s + cost.average_s + cost.sum_s + cost.check_s)
    dense = explain(SHAPES, participants, Terms(packing=Packing.DENSE), aggregator_rates=rates).aggregator
    assert dense.projection_s == pytest.approx(2 * cost.projection_s - 2 * 2.0), "once more for the ranges"


def test_memory_does_not_grow_with_the_agents() -> None:
    shapes = parse_shapes("3*512x512")
    terms = Terms(cap=64)

    def held(count: int) -> planned.AggregatorCost:
        return explain(shapes, imagine(shapes, [16] * count, ["full"], terms), terms).aggregator

    sketched, more = held(1100), held(4000)
    assert sketched.peak_ram_bytes - sketched.notes_bytes == more.peak_ram_bytes - more.notes_bytes
    assert more.notes_bytes == 2 * 3 * 4000 * 400, "what is left is noted down about every tensor"
    for count in (2, 100, 127, 128, 129):
        cost = held(count)
        assert cost.peak_ram_bytes - cost.notes_bytes <= cost.ram_ceiling_bytes == more.ram_ceiling_bytes
    assert held(128).peak_ram_bytes > 0.9 * more.ram_ceiling_bytes, "2^20 values are decomposed at once"
    assert more.basis_s > 3 * sketched.basis_s


def test_only_dense_tensors_need_no_basis() -> None:
    shapes = parse_shapes("dense*10")
    cost = explain(shapes, imagine(shapes, [4, 4], ["full"])).aggregator
    assert cost.basis_s == 0
    assert cost.peak_ram_bytes == cost.ram_ceiling_bytes == (4 << 20) + 2 * 65_536
    bare = explain(SHAPES, [Participant("a", 4, "", (0, 0))])
    assert bare.agents[0].blocks == 1, "dense tensors are always encrypted"
    none = parse_shapes("2*64x48")
    assert explain(none, imagine(none, [4], ["0%"])).aggregator.sum_s == 0


@pytest.mark.parametrize("batch", [True, False])
async def test_memory_of_the_real_computations(tmp_path, batch) -> None:
    """Twelve members of rank 8 on two modules of 1024 x 512; the decomposition's workspace is not traced."""
    shapes, rng = parse_shapes("2*1024x512"), np.random.default_rng(3)
    plan = Plan(
        "x", 1, 1, shapes, 16, Negotiation.NONE, ((0,), (0,)), USUAL_PARAMETERS.digest(), 4096
    )  # fmt: skip
    blobs, pool = DirectoryBlobStore(tmp_path), WorkerPool(1)
    members = []
    for index in range(12):
        tensors = {f"{one}.left": rng.normal(size=(1024, 8)).astype(np.float32) for one in range(2)}
        tensors |= {f"{one}.right": np.full((8, 512), 0.01, np.float32) for one in range(2)}
        blob = await blobs.write(f"factors-{index}", [safetensors.numpy.save(tensors)])
        members.append(CohortMember(f"a{index}", 8, (0, 0), 1 / 12, 1, blob))
    compute = LocalCompute(blobs, pool, compute_module.BATCH_VALUES if batch else 0)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        result = await compute.compute_basis(plan, members, "round")
        members = [replace(member, projection=result.projections[member.agent]) for member in members]
        await compute.compute_average(plan, result.basis, members, "average")
        held = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
        pool.close()
    said = explain(shapes, imagine(shapes, [8] * 12, ["0%"], Terms(cap=16)), Terms(cap=16)).aggregator
    if batch:
        # One thread computes here; two hold a module each.
        assert 0.5 < held / (said.peak_ram_bytes / planned.THREADS) < 1.1
    else:
        assert held < said.ram_ceiling_bytes / 10
