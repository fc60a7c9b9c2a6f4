from __future__ import annotations

import asyncio

import pytest
from prometheus_client import CollectorRegistry

from services.aggregator.compute import LocalCompute
from services.aggregator.domain import ExpectedPayload, FederationSpec, PayloadKind
from services.aggregator.federation_metrics import REFRESH_S, FederationMetrics
from services.aggregator.metrics import MeasuredChecks, MeasuredCompute, watch_pool
from services.aggregator.payloads import UploadChecks
from services.aggregator.service import AggregatorService
from services.aggregator.store import MIGRATIONS
from services.common.database import Database, migrate
from shelora.errors import SizeMismatch
from support.clock import FakeClock
from support.updates import PARAMETERS, make_plan

PLAN = make_plan([(10, 6)])


async def test_checks_count_what_passes_and_what_is_refused(tmp_path, pool):
    registry = CollectorRegistry()
    checks = MeasuredChecks(UploadChecks(pool), registry)
    expected = ExpectedPayload(PayloadKind.CIPHER, PLAN, PARAMETERS, blocks=1)
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.write_bytes(bytes(PARAMETERS.block_bytes))
    bad.write_bytes(bytes(8))

    assert await checks.check(good, expected) == PARAMETERS.block_bytes
    with pytest.raises(SizeMismatch):
        await checks.check(bad, expected)

    assert checks.size_limit_bytes(expected) == PARAMETERS.block_bytes
    passed = registry.get_sample_value("shelora_checked_bytes_total", {"kind": "cipher"})
    assert passed == PARAMETERS.block_bytes
    labels = {"kind": "cipher", "code": "size_mismatch"}
    assert registry.get_sample_value("shelora_refused_payloads_total", labels) == 1


async def test_computations_are_timed_also_when_they_fail(blobs, pool):
    registry = CollectorRegistry()
    compute = MeasuredCompute(LocalCompute(blobs, pool), registry, FakeClock())
    term = await blobs.write("term", [bytes(PARAMETERS.block_bytes)])

    await compute.fold_residues(None, [term], 1, PARAMETERS, "sum")
    with pytest.raises(SizeMismatch):
        await compute.fold_residues(None, [term], 0, PARAMETERS, "none")

    assert registry.get_sample_value("shelora_compute_seconds_count", {"step": "fold"}) == 2


async def test_pools_show_how_busy_they_are(pool):
    registry = CollectorRegistry()
    watch_pool(registry, "checks", pool)

    assert await pool.run(registry.get_sample_value, "shelora_checks_running") == 1
    assert registry.get_sample_value("shelora_checks_waiting") == 0


async def test_federations_are_shown_and_a_lost_database_is_survived(tmp_path, blobs, pool):
    url = f"sqlite:///{tmp_path / 'state.db'}"
    await asyncio.to_thread(migrate, url, MIGRATIONS)
    database, clock, registry = Database(url), FakeClock(), CollectorRegistry()
    service = AggregatorService(database, blobs, UploadChecks(pool), clock)
    await service.create_federation(FederationSpec("ward", 3, 3, 2, 1, PARAMETERS))
    gauges = FederationMetrics(service, registry, clock)

    await gauges.refresh()

    assert registry.get_sample_value("shelora_federation_rounds", {"federation": "ward"}) == 3
    created = {"federation": "ward", "state": "created"}
    assert registry.get_sample_value("shelora_federation_state", created) == 1
    await database.close()
    (tmp_path / "state.db").write_bytes(b"this is no database")
    task = asyncio.create_task(gauges.run())
    await _asleep(clock)
    clock.advance(REFRESH_S)
    await _asleep(clock)
    assert not task.done()
    assert registry.get_sample_value("shelora_federation_rounds", {"federation": "ward"}) == 3
    task.cancel()
    await database.close()


async def _asleep(clock):
    for _ in range(3000):
        if clock.sleepers:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the task never slept")
