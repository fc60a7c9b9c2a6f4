from __future__ import annotations

import pytest

from bench.aggregator import sums as sums_module
from bench.aggregator.agents import PARAMETERS, Workload
from bench.aggregator.ingest import uploads
from services.aggregator.residue_sums import check_ciphertext


def test_a_workload_is_what_the_aggregator_expects(tmp_path):
    workload = Workload(2, hidden=256)
    factors, cipher = workload.write(tmp_path)
    assert (workload.blocks, cipher.stat().st_size) == (2, workload.cipher_bytes)
    assert factors.stat().st_size > workload.factors_bytes
    check_ciphertext(cipher, workload.blocks, PARAMETERS)
    assert Workload(82).cipher_bytes == 82 * 16 * 65536


@pytest.mark.timeout(120)
async def test_uploads_are_taken_by_both_servers(tmp_path):
    records = [record async for record in uploads(tmp_path, Workload(1, hidden=256), 2, 1)]
    assert [(record["at_once"], record["bytes"]) for record in records] == [(2, 2 * 65536)]
    assert all(records[0][key] > 0 for key in ("product_s", "bare_s", "stream_s"))


def test_sums_are_measured_with_the_product_s_own_code(tmp_path, monkeypatch):
    monkeypatch.setattr(sums_module, "TERM_BLOCKS", 3)
    monkeypatch.setattr(sums_module, "TERMS", (2, 3))
    monkeypatch.setattr(sums_module, "REPEATS", 1)
    monkeypatch.setattr(sums_module, "_COPY_BYTES", 1 << 20)
    monkeypatch.setattr(sums_module, "_COPY_S", 0.001)
    records = list(sums_module.sums(tmp_path / "sums"))
    assert [record["what"] for record in records] == ["copy", "kernel", "fold", "fold"] * 2 + ["add"]
    assert [record["bytes"] for record in records if record["what"] == "fold"] == [2 * 3 * 65536, 3 * 3 * 65536] * 2
    assert not (tmp_path / "sums").exists()
