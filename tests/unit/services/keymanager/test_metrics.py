from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from services.common.identity import Identity, Role
from services.common.sealing import SealingKey
from services.keymanager.host import opened
from services.keymanager.metrics import REFRESH_S, KeyManagerMetrics, watched
from services.keymanager.seal import make_key_file
from services.keymanager.service import KeyManager
from shelora.errors import InvalidToken, RoleDenied, StoredBytesCorrupt
from support.clock import FakeClock
from support.keymanager import FEDERATION, keymanager_config, local_keymanager, signing_request

AGENT = Identity(FEDERATION, Role.AGENT, "agent-1")
AGGREGATOR = Identity(FEDERATION, Role.AGGREGATOR, "main")
PREFIX = "shelora_keymanager_"


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def keymanager(tmp_path: Path, clock: FakeClock) -> AsyncIterator[KeyManager]:
    async with local_keymanager(tmp_path, clock) as found:
        yield found


async def use(keymanager: KeyManager) -> None:
    """Enrol, fetch, renew, and be refused."""
    token = await keymanager.create_token(None, Role.AGENT, "agent-1")
    await keymanager.enrol(FEDERATION, token.token, signing_request())
    with pytest.raises(InvalidToken):
        await keymanager.enrol(FEDERATION, "x" * 40, signing_request())
    public = SealingKey.generate().public_bytes()
    for _ in range(2):
        await keymanager.fetch_epoch(AGENT, 0, public)
    with pytest.raises(RoleDenied):
        await keymanager.fetch_epoch(AGGREGATOR, 0, public)
    await keymanager.rotate_epoch(None, "a test")
    await keymanager.retire_epoch(None, 1)


def decisions(registry: CollectorRegistry) -> dict[tuple[str, str], float]:
    return {
        (sample.labels["action"], sample.labels["outcome"]): sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == f"{PREFIX}decisions_total" and sample.value
    }


async def test_grants_and_refusals_come_from_the_audit_log_also_after_a_restart(
    keymanager: KeyManager, clock: FakeClock, tmp_path: Path
) -> None:
    registry = CollectorRegistry()
    metrics = KeyManagerMetrics(keymanager, registry, clock)
    await metrics.refresh()
    labels = {"action": "fetch-secret", "outcome": "granted"}
    assert registry.get_sample_value(f"{PREFIX}decisions_total", labels) == 0
    await use(keymanager)
    await metrics.refresh()
    await metrics.refresh()
    found = decisions(registry)
    assert found["fetch-secret", "granted"] == 2
    assert found["fetch-secret", "role_denied"] == 1
    assert found["enrol", "granted"] == 1
    assert found["enrol", "invalid_token"] == 1
    assert registry.get_sample_value(f"{PREFIX}epoch") == 2
    assert registry.get_sample_value(f"{PREFIX}epochs", {"state": "retired"}) == 1
    assert registry.get_sample_value(f"{PREFIX}epochs", {"state": "superseded"}) == 0
    assert registry.get_sample_value(f"{PREFIX}kek_usable") == 1
    assert registry.get_sample_value("shelora_database_up") == 1
    assert sum(found.values()) == await keymanager.verify_audit()
    async with opened(keymanager_config(tmp_path), clock) as again:
        restarted = CollectorRegistry()
        await KeyManagerMetrics(again, restarted, clock).refresh()
    assert decisions(restarted) == found


async def test_another_key_opens_nothing(keymanager: KeyManager, clock: FakeClock, tmp_path: Path) -> None:
    """A key manager whose state was sealed under a key that this process does not have."""
    config = keymanager_config(tmp_path)
    other = tmp_path / "other.kek"
    make_key_file(other)
    registry = CollectorRegistry()
    metrics = KeyManagerMetrics(keymanager, registry, clock)
    await metrics.refresh()
    both = config.model_copy(update={"kek": None, "kek_file": tmp_path / "both.kek"})
    both.kek_file.write_text(other.read_text() + config.kek_file.read_text())
    both.kek_file.chmod(0o600)
    async with opened(both, clock) as resealing:
        await resealing.reseal()
    with pytest.raises(StoredBytesCorrupt):
        await metrics.refresh()
    async with watched(keymanager, registered := CollectorRegistry(), tmp_path, clock):
        while clock.sleepers < 1:
            await clock.sleep(0)
        assert registered.get_sample_value(f"{PREFIX}kek_usable") == 0
        assert registered.get_sample_value("shelora_database_up") == 1


async def test_the_figures_follow_and_a_lost_database_is_survived(
    keymanager: KeyManager, clock: FakeClock, tmp_path: Path
) -> None:
    registry = CollectorRegistry()
    async with watched(keymanager, registry, tmp_path, clock):
        while clock.sleepers < 1:
            await clock.sleep(0)
        assert registry.get_sample_value(f"{PREFIX}epoch") == 1
        certificate = {"certificate": "authority"}
        end_s = registry.get_sample_value("shelora_certificate_expiry_timestamp_seconds", certificate)
        assert end_s is not None
        assert end_s > clock.now_ms() / 1000
        await keymanager.rotate_epoch(None, "a test")
        while registry.get_sample_value(f"{PREFIX}epoch") != 2:
            await clock.advance(REFRESH_S)
        # An open SQLite file outlives its name: the connection has to be opened anew to meet the damage.
        await keymanager._store._database.close()
        (tmp_path / "state/keymanager.db").write_bytes(b"this is no database")
        while registry.get_sample_value("shelora_database_up"):
            await clock.advance(REFRESH_S)
        assert registry.get_sample_value(f"{PREFIX}epoch") == 2
