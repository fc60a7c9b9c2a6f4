"""Bytes by hand, seconds by hand, memory against what the agent's own steps hold."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from services.client_agent.adapter import AdapterState
from services.client_agent.round import cipher_values, local_update, open_average
from services.operators.planning import Participant, Rates, Terms, explain, imagine, parse_shapes
from services.operators.planning.costs import published_by, step_bytes
from services.operators.planning.explanation import cohort_layout
from shelora.he.residues import as_blocks
from shelora.he.secret import CkksContext, Decryptor, Encryptor
from shelora.lora import Adapter
from shelora.plan import DenseShape, ModelShapes, ModuleShape, Packing

PUBLISHED = parse_shapes("104*3200x3200")


def test_the_example_of_the_method_page() -> None:
    """104 modules of 3200 x 3200, four agents of rank 4: the table of docs/method.md section 7."""
    for budget, factors, cipher, blocks, average in (
        ("full", 5.3e6, 85.2e6, 1300, 21.3e6),
        ("10%", 10.1e6, 8.5e6, 130, 40.5e6),
        ("0%", 10.6e6, 0, 0, 42.6e6),
    ):
        found = explain(PUBLISHED, imagine(PUBLISHED, [4] * 4, [budget]))
        cost = found.agents[0]
        assert found.basis.rows == (16,) * 104
        assert found.basis.exact
        assert cost.blocks == blocks
        assert cost.factors_bytes == pytest.approx(factors, abs=0.05e6)
        assert cost.cipher_up_bytes == pytest.approx(cipher, abs=0.05e6)
        assert cost.average_bytes == pytest.approx(average, abs=0.05e6)
        assert cost.cipher_down_bytes == cost.cipher_up_bytes
        assert cost.projection_bytes == 4 * 104 * 16 * 4


def test_dense_packing_halves_the_ciphertext_of_the_example() -> None:
    """At most 45 MB an agent where everything is encrypted; the ranges are 4 bytes a basis row."""
    exact = explain(PUBLISHED, imagine(PUBLISHED, [4] * 4, ["full"])).agents[0]
    terms = Terms(packing=Packing.DENSE)
    dense = explain(PUBLISHED, imagine(PUBLISHED, [4] * 4, ["full"], terms), terms).agents[0]
    assert dense.blocks == 650
    assert dense.cipher_up_bytes == dense.cipher_down_bytes == 42_598_400 <= 45e6
    assert dense.factors_bytes == exact.factors_bytes
    assert dense.projection_bytes - exact.projection_bytes == 4 * 104 * 16
    assert dense.average_bytes - exact.average_bytes == 4 * 104 * 16


@given(
    m=st.integers(8, 60),
    n=st.integers(8, 60),
    ranks=st.lists(st.integers(1, 8), min_size=1, max_size=5),
    dense=st.integers(1, 5000),
    data=st.data(),
)
def test_bytes_by_hand(m, n, ranks, dense, data) -> None:
    shapes = ModelShapes((ModuleShape("a", m, n), ModuleShape("b", m, n)), (DenseShape("d", (dense,)),))
    columns = [data.draw(st.integers(0, n)) for _ in ranks]
    participants = [
        Participant(f"p{i}", rank, "", (k, k)) for i, (rank, k) in enumerate(zip(ranks, columns, strict=True))
    ]
    found = explain(shapes, participants)
    s = min(sum(ranks), 4 * max(ranks), m)
    assert found.basis.rows == (s, s)
    for cost, rank, k in zip(found.agents, ranks, columns, strict=True):
        assert cost.factors_bytes == 4 * 2 * (m * rank + rank * (n - k))
        assert cost.blocks == -(-(dense + 2 * s * k) // 4096)
        assert cost.cipher_up_bytes == 65_536 * cost.blocks
        assert cost.projection_bytes == 4 * 2 * s * rank
        assert cost.average_bytes == 4 * 2 * (m * s + s * (n - min(columns)))
        assert cost.cipher_down_bytes == 65_536 * -(-(dense + 2 * s * max(columns)) // 4096)
        assert cost.up_bytes == cost.factors_bytes + cost.cipher_up_bytes
        assert cost.down_bytes == cost.projection_bytes + cost.average_bytes + cost.cipher_down_bytes


def test_seconds_by_hand() -> None:
    """Two modules of 100 x 200, agents of rank 4 and 12 with everything encrypted: s = 16, 6,400 values, 2 blocks."""
    rates = Rates(
        encrypt_values_per_s=4096,
        decrypt_values_per_s=8192,
        upload_bytes_per_s=1000,
        download_bytes_per_s=2000,
        decompose_flops_per_s=1e6,
        multiply_flops_per_s=1e9,
        memory_values_per_s=1e5,
        call_s=0.5,
        step_s=0.7,
        cores=2,
    )
    shapes = parse_shapes("2*100x200")
    found = explain(shapes, imagine(shapes, [4, 12], ["full"]), rates=rates).agents[0]
    assert found.blocks == 2
    assert found.encrypt_s == pytest.approx(2 * 4096 / (4096 * 2))
    assert found.decrypt_s == pytest.approx(2 * 4096 / (8192 * 2))
    assert found.upload_s == pytest.approx((4 * 2 * 100 * 4 + 2 * 65_536) / 1000)
    down = 4 * 2 * 16 * 4 + 4 * 2 * 100 * 16 + 2 * 65_536
    assert found.download_s == pytest.approx(down / 2000)
    assert found.canonical_s == pytest.approx(2 * (1.0 + 12 * 300 * 16 / 1e6))
    assert found.pack_s == pytest.approx(2 * (0.25 + 4 * 16 * 200 / 1e5 + 2 * 16 * 4 * 200 / 1e9))
    svd = (6 * 200 * 256 + 8 * 4096) * (16 + 64) / 16 / 1e6
    moved = (16 * 300 + 2.5 * 16 * 200 + 4.5 * 4 * 200) / 1e5
    assert found.refit_s == pytest.approx(2 * (0.5 + moved + svd))
    parts = (found.canonical_s, found.pack_s, found.encrypt_s, found.upload_s, found.download_s, found.decrypt_s)
    assert found.seconds == pytest.approx(sum(parts) + found.refit_s + 3 * 0.7)
    assert not found.measured
    terms = Terms(packing=Packing.DENSE)
    dense = explain(shapes, imagine(shapes, [4, 12], ["full"]), terms, rates=rates).agents[0]
    assert dense.pack_s - found.pack_s == pytest.approx(2 * 4 * 16 * 200 / 1e5)


def test_an_agent_has_its_own_rates_where_it_measured_them() -> None:
    shapes = parse_shapes("2*100x200")
    slow = Participant("slow", 4, "full", (200, 200), rates=Rates(encrypt_values_per_s=1.0, measured=True))
    found = explain(shapes, [slow, Participant("usual", 4, "full", (200, 200))])
    assert [cost.measured for cost in found.agents] == [True, False]
    assert found.agents[0].encrypt_s == found.agents[0].blocks * 4096
    assert found.agents[1].encrypt_s == pytest.approx(found.agents[1].blocks * 4096 / Rates().encrypt_values_per_s)


@pytest.fixture(scope="module")
def crypto() -> Iterator[tuple[Encryptor, Decryptor]]:
    context = CkksContext.create()
    keys = context.generate_keys()
    with Encryptor(context, keys.public, 1) as encryptor, Decryptor(context, keys.public, keys.secret, 1) as decryptor:
        yield encryptor, decryptor


def peak_bytes(work: Callable[[], object]) -> int:
    """Most that the work had allocated at once; OpenFHE's own small objects do not show."""
    work()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        work()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("packing", Packing)
@pytest.mark.parametrize("k", [512, 64])
def test_memory_is_what_the_steps_hold(crypto, packing, k) -> None:
    """An agent's own functions on four modules of 512 x 512, traced."""
    encryptor, decryptor = crypto
    rng = np.random.default_rng(5)
    shapes = parse_shapes("4*512x512,dense*1000")
    participants = (Participant("a", 8, "", (k,) * 4), Participant("b", 24, "", (k,) * 4))
    terms = Terms(packing=packing)
    layout = cohort_layout(shapes, participants, terms)
    held = step_bytes(shapes, layout, participants[0], published_by(shapes, layout, participants))
    adapter = AdapterState(
        tuple(Adapter(rng.normal(size=(512, 8)) / 50, rng.normal(size=(8, 512))) for _ in range(4)),
        (rng.normal(size=1000),),
    )
    update = local_update(adapter, 1.0)
    own = sum(factors.left.nbytes + factors.right.nbytes for factors in update.factors) + 8000
    orders = [rng.permutation(512) for _ in range(4)]
    basis = [np.linalg.qr(rng.normal(size=(512, 32)))[0].astype(np.float32) for _ in range(4)]
    answer = {f"{i}.projection": (basis[i].T @ update.factors[i].left).astype(np.float32) for i in range(4)}
    answer |= {f"{i}.range": np.full(32, 8.0, np.float32) for i in range(4)}

    def pack() -> np.ndarray:
        return cipher_values(update, orders, (k,) * 4, answer, 0.5, layout)

    assert held["pack"] == pytest.approx(peak_bytes(pack) + own, rel=0.25)
    values = pack()
    encrypting = peak_bytes(lambda: encryptor.encrypt(values)) + own + values.nbytes
    assert held["encrypt"] == pytest.approx(encrypting, rel=0.25)
    payload = encryptor.encrypt(values).tobytes()
    plain = {f"{i}.basis": basis[i] for i in range(4)} | {
        f"{i}.plain": np.zeros((32, 512 - k), np.float32) for i in range(4)
    }
    plain |= {f"{i}.range": np.full(32, 8.0, np.float32) for i in range(4)}
    stored = safetensors.numpy.save(plain)

    def average() -> object:
        blocks = as_blocks(bytes(bytearray(payload)), encryptor.parameters)
        opened = decryptor.decrypt(blocks, values.size)
        return open_average(safetensors.numpy.load(stored), opened, orders, layout, (k,) * 4, 0.5)

    predicted = max(held["parse"], held["split"], held["open"])
    assert predicted == pytest.approx(peak_bytes(average), rel=0.3)
