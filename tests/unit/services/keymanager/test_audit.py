from __future__ import annotations

import functools
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from services.common.audit import GENESIS, chained, check_chain
from services.common.database import Connection, Database
from services.common.identity import Identity, Role
from services.common.sqlite import SqliteConnection
from services.keymanager.audit import AuditLog
from services.keymanager.service import KeyManager
from shelora.errors import RoleDenied, StorageFull, StoredBytesCorrupt, ValueOutOfRange
from support.clock import FakeClock
from support.keymanager import FEDERATION, keymanager_config, local_keymanager, raw_store

OPERATOR = Identity(FEDERATION, Role.OPERATOR, "alice")
AGENT = Identity(FEDERATION, Role.AGENT, "agent-1")


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def keymanager(tmp_path: Path, clock: FakeClock) -> AsyncIterator[KeyManager]:
    async with local_keymanager(tmp_path, clock) as found:
        for name in ("agent-1", "agent-2", "agent-3"):
            await found.create_token(OPERATOR, Role.AGENT, name)
        yield found


async def tamper(folder: Path, *statements: str) -> None:
    """Change the database as somebody who owns the host could, triggers switched off."""
    database = Database(keymanager_config(folder).database_url)

    async def body(connection: Connection) -> None:
        for trigger in ("audit_no_update", "audit_no_delete"):
            await connection.execute(sa.text(f"DROP TRIGGER IF EXISTS {trigger}"))
        for statement in statements:
            await connection.execute(sa.text(statement))

    try:
        await database.run_tx("tamper", body)
    finally:
        await database.close()


async def test_the_log_of_honest_work_verifies(keymanager: KeyManager) -> None:
    with pytest.raises(RoleDenied):
        await keymanager.rotate_epoch(AGENT, "")
    assert await keymanager.verify_audit() == 5
    records = await keymanager.audit_records(OPERATOR)
    assert check_chain(records) == (5, records[-1].digest)
    assert [record.sequence for record in records] == [1, 2, 3, 4, 5]


async def test_records_come_in_pages(keymanager: KeyManager) -> None:
    assert [record.sequence for record in await keymanager.audit_records(OPERATOR, 1, 2)] == [2, 3]
    assert await keymanager.audit_records(OPERATOR, 2**63, 2) == []
    for limit in (-1, 1001):
        with pytest.raises(ValueOutOfRange, match="limit"):
            await keymanager.audit_records(OPERATOR, 0, limit)


@pytest.mark.parametrize("page_records", [1, 2, 3, 4, 5])
async def test_a_log_longer_than_a_page_verifies(
    keymanager: KeyManager, tmp_path: Path, clock: FakeClock, page_records: int
) -> None:
    config = keymanager_config(tmp_path)
    async with raw_store(config) as (store, _):
        log = AuditLog(store, config.vault(), FEDERATION, clock, page_records=page_records)
        assert await log.verify() == 4
        await keymanager.fetch_epoch(OPERATOR, 0)
        assert await log.verify() == 5


async def test_the_database_itself_takes_no_change_of_a_record(keymanager: KeyManager, tmp_path: Path) -> None:
    for statement in ("UPDATE audit SET actor = 'nobody'", "DELETE FROM audit WHERE sequence = 2"):
        database = Database(keymanager_config(tmp_path).database_url)
        change = functools.partial(SqliteConnection.execute, statement=sa.text(statement))
        with pytest.raises(sa.exc.IntegrityError, match="the audit log takes no"):
            await database.run_tx("tamper", change)
        await database.close()
    assert await keymanager.verify_audit() == 4


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE audit SET actor = 'local' WHERE sequence = 2", "record 2: expected digest"),
        ("UPDATE audit SET outcome = 'denied' WHERE sequence = 4", "record 4: expected digest"),
        ("UPDATE audit SET at_ms = at_ms + 1 WHERE sequence = 1", "record 1: expected digest"),
        ("DELETE FROM audit WHERE sequence = 2", "expected record 2, got record 3"),
        ("DELETE FROM audit WHERE sequence = 4", "expected 4 records"),
        ("DELETE FROM audit", "expected 4 records"),
        ("DELETE FROM audit_head", "expected 0 records"),
        ("UPDATE audit_head SET sealed = zeroblob(80)", "audit head"),
    ],
)
async def test_tampering_is_found(keymanager: KeyManager, tmp_path: Path, statement: str, message: str) -> None:
    await tamper(tmp_path, statement)
    with pytest.raises(StoredBytesCorrupt, match=message):
        await keymanager.verify_audit()


async def test_a_chain_written_anew_is_found(keymanager: KeyManager, tmp_path: Path) -> None:
    records = await keymanager.audit_records(OPERATOR)
    previous, statements = GENESIS, []
    for record in [replace(one, actor="local") for one in records]:
        forged = chained(
            previous,
            sequence=record.sequence,
            at_ms=record.at_ms,
            actor=record.actor,
            action=record.action,
            subject=record.subject,
            outcome=record.outcome,
        )
        previous = forged.digest
        change = f"SET actor = 'local', digest = x'{forged.digest.hex()}' WHERE sequence = {forged.sequence}"
        statements.append(f"UPDATE audit {change}")
    await tamper(tmp_path, *statements)
    check_chain(await keymanager.audit_records(OPERATOR))
    with pytest.raises(StoredBytesCorrupt, match="expected 4 records that end in"):
        await keymanager.verify_audit()


async def test_a_flood_of_refusals_cannot_fill_the_log(keymanager: KeyManager, clock: FakeClock) -> None:
    async def refused() -> None:
        with pytest.raises(RoleDenied):
            await keymanager.audit_records(AGENT)

    for _ in range(100):
        await refused()
    assert await keymanager.verify_audit() == 4 + 60
    clock.advance(2)
    await refused()
    last = (await keymanager.audit_records(OPERATOR, 60))[-1]
    assert last.subject == "list audit-records (40 more not recorded)"
    with pytest.raises(RoleDenied):
        await keymanager.rotate_epoch(Identity(FEDERATION, Role.AGENT, "agent-2"), "")
    assert await keymanager.verify_audit() == 4 + 60 + 2


async def test_an_effect_without_its_record_does_not_happen(keymanager: KeyManager, tmp_path: Path) -> None:
    await tamper(
        tmp_path,
        "CREATE TRIGGER full BEFORE INSERT ON audit WHEN NEW.action = 'rotate' "
        "BEGIN SELECT RAISE(ABORT, 'database or disk is full'); END",
    )
    with pytest.raises(StorageFull):
        await keymanager.rotate_epoch(OPERATOR, "")
    assert [epoch.number for epoch in await keymanager.list_epochs(OPERATOR)] == [1]


async def test_a_refusal_stays_a_refusal_when_the_log_is_full(keymanager: KeyManager, tmp_path: Path) -> None:
    await tamper(
        tmp_path,
        "CREATE TRIGGER full BEFORE INSERT ON audit BEGIN SELECT RAISE(ABORT, 'database or disk is full'); END",
    )
    with pytest.raises(RoleDenied):
        await keymanager.rotate_epoch(AGENT, "")
    await tamper(tmp_path, "DROP TRIGGER full")
    with pytest.raises(RoleDenied):
        await keymanager.rotate_epoch(AGENT, "")
    assert (await keymanager.audit_records(OPERATOR))[-1].subject == "rotate epochs (1 more not recorded)"
