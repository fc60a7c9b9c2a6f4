from __future__ import annotations

import anyio
import pytest
from anyio.abc import SocketAttribute

from bench.aggregator import sums as sums_module
from bench.aggregator.agents import PARAMETERS, Workload
from bench.aggregator.cohorts import Cohort, cohorts
from bench.aggregator.distance import distances, relay
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


@pytest.mark.timeout(120)
async def test_more_agents_than_places_take_part_in_every_round(tmp_path):
    (record,) = [record async for record in cohorts(tmp_path, Workload(1), [Cohort(3, rounds=2, places=2)])]
    assert (record["counted"], record["bytes"]) == (6, 6 * 16 * 65536)
    assert 0 < record["idle_bytes"] <= record["most_bytes"]
    assert 0 < record["sampled_bytes"] <= record["most_bytes"]


async def test_a_relay_lets_every_byte_wait():
    async def echo(stream):
        async with stream:
            async for data in stream:
                await stream.send(data)

    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, echo)
        port = listener.extra(SocketAttribute.local_port)  # noqa: S610  # anyio's, not a query's
        async with (
            relay(f"127.0.0.1:{port}", 0.1) as far,
            await anyio.connect_tcp("127.0.0.1", int(far.split(":")[1])) as stream,
        ):
            started = anyio.current_time()
            await stream.send(b"there and ")
            await stream.send(b"back")
            await stream.send_eof()
            assert b"".join([data async for data in stream]) == b"there and back"
            assert anyio.current_time() - started >= 0.2
        tasks.cancel_scope.cancel()


@pytest.mark.timeout(120)
async def test_a_far_aggregator_takes_uploads_and_gives_sums(tmp_path):
    records = [record async for record in distances(tmp_path, Workload(1, hidden=256), (0.01,), (64 << 10,))]
    assert [(record["window_bytes"], record["bytes"]) for record in records] == 2 * [(64 << 10, 65536)]
    assert all(record[key] >= 0.01 for record in records for key in ("up_s", "down_s"))


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
