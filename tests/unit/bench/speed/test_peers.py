"""The re-created procedure, TenSEAL's vectors and plaintext averaging do what they are compared for."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from bench.speed.baseline import ENCRYPTED_STEPS, PLAIN_STEPS, measure_baseline, scale_baseline
from bench.speed.load import Run
from bench.speed.plain import PlainAverage, pack, unpack
from bench.speed.vectors import measure_vectors
from services.client_agent.adapter import AdapterState
from services.common.transfer import pieces
from shelora.lora import Adapter

RUN = Run(agents=3, modules=10, out_features=24, in_features=40, ranks=(2,), budgets=("10%",))


def test_the_re_created_procedure_opens_the_average() -> None:
    measured = measure_baseline(RUN, pairs=1, columns=2)
    assert 0.0 < measured["max_abs_error"] < 1e-2
    assert all(measured[f"{step}_s"] > 0.0 for step in (*ENCRYPTED_STEPS, *PLAIN_STEPS))
    assert measured["up_bytes"] > 2 * 8192


def test_scaling_is_by_pairs_and_for_encrypted_steps_by_columns() -> None:
    measured = {f"{step}_s": 1.0 for step in ENCRYPTED_STEPS} | {f"{step}_s": 10.0 for step in PLAIN_STEPS}
    measured |= {"columns": 2, "pairs": 5, "up_bytes": 100.0, "sum_bytes": 50.0}
    scaled = scale_baseline(measured, RUN)
    assert (scaled["columns_scale"], scaled["pairs_scale"]) == (2.0, 2.0)
    assert scaled["total_s"] == 10 * (2.0 * len(ENCRYPTED_STEPS) + 10.0 * len(PLAIN_STEPS))
    assert (scaled["up_bytes"], scaled["down_bytes"]) == (2000.0, 1000.0)


def test_both_libraries_open_the_same_mean() -> None:
    records = list(measure_vectors(RUN, layers=2, repeats=1))
    assert [record["library"] for record in records] == ["shelora", "TenSEAL"]
    assert all(record["max_abs_error"] < 1e-7 for record in records)
    assert all(record["values"] == 2 * 2 * (24 + 40) for record in records)


async def test_the_mean_of_a_full_set_answers_every_sender() -> None:
    averaging = PlainAverage(2)

    async def send(vector: np.ndarray) -> np.ndarray:
        async def requests():
            for piece in pieces(vector.astype(np.float32).tobytes()):
                yield piece

        received = b"".join([piece.data async for piece in averaging.average(requests(), None)])
        return np.frombuffer(received, dtype=np.float32)

    for number in range(2):
        first, second = await asyncio.gather(send(np.full(5, number)), send(np.full(5, number + 3.0)))
        np.testing.assert_array_equal(first, np.full(5, number + 1.5))
        np.testing.assert_array_equal(second, first)


def test_states_survive_packing() -> None:
    rng = np.random.default_rng(0)
    state = AdapterState((Adapter(rng.normal(size=(4, 2)), rng.normal(size=(2, 3))),), (rng.normal(size=(2, 2)),))
    again = unpack(np.frombuffer(pack(state), dtype=np.float32), state)
    np.testing.assert_allclose(again.modules[0].b, state.modules[0].b, rtol=1e-6)
    np.testing.assert_allclose(again.modules[0].a, state.modules[0].a, rtol=1e-6)
    np.testing.assert_allclose(again.dense[0], state.dense[0], rtol=1e-6)


@pytest.mark.parametrize("budget", ["10%", "full"])
def test_the_aggregator_s_computations_are_measured_in_a_process_of_their_own(tmp_path, budget) -> None:
    from bench.speed.computing import measure_computing

    run = Run(agents=5, modules=2, out_features=16, in_features=24, ranks=(2, 4), budgets=(budget,))
    record = measure_computing(run, tmp_path / "work")
    assert record["average_bytes"] >= record["predicted_average_bytes"] > 0
    assert record["peak_bytes"] >= record["idle_bytes"] > 0
    assert not (tmp_path / "work").exists()
