from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric import ec

from services.common.database import Database
from services.common.identity import Identity, Role
from services.common.keymanager_client import open_secrets
from services.common.sealing import SealingKey
from services.keymanager.domain import EpochState
from services.keymanager.host import initialise, opened
from services.keymanager.seal import make_key_file
from services.keymanager.service import KeyManager
from shelora.errors import (
    InvalidConfiguration,
    MalformedPayload,
    RoleDenied,
    StoredBytesCorrupt,
    UnknownAgent,
    UnknownEpoch,
    ValueOutOfRange,
    WrongEpoch,
)
from shelora.he.secret import CkksContext, Decryptor, Encryptor, PublicKey, SecretKey
from support.clock import FakeClock
from support.keymanager import (
    FEDERATION,
    keymanager_config,
    local_keymanager,
    raw_store,
    signing_request,
    stored_secrets,
)

OPERATOR = Identity(FEDERATION, Role.OPERATOR, "alice")
AGGREGATOR = Identity(FEDERATION, Role.AGGREGATOR, "main")
AGENT = Identity(FEDERATION, Role.AGENT, "agent-1")
KEY = SealingKey.generate()


@pytest.fixture
async def keymanager(tmp_path: Path) -> AsyncIterator[KeyManager]:
    async with local_keymanager(tmp_path) as found:
        yield found


async def actions(keymanager: KeyManager) -> list[tuple[str, str, str]]:
    records = await keymanager.audit_records(OPERATOR, 0, 1000)
    return [(record.action, record.subject, record.outcome) for record in records]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


async def execute(path: Path, statement: str) -> None:
    database = Database(keymanager_config(path).database_url)
    try:
        await database.run_tx("tamper", lambda connection: connection.execute(sa.text(statement)))
    finally:
        await database.close()


async def test_an_agent_gets_secrets_that_decrypt_under_the_public_key(keymanager: KeyManager) -> None:
    epoch, sealed = await keymanager.fetch_epoch(AGENT, 0, KEY.public_bytes())
    secret_key, seed = open_secrets(sealed, KEY, FEDERATION, epoch.number, "agent-1")
    assert len(seed) == 32
    context = CkksContext.from_parameters(epoch.parameters)
    public = PublicKey(epoch.public_key)
    with Encryptor(context, public, 1) as encryptor, Decryptor(context, public, SecretKey(secret_key), 1) as decryptor:
        values = np.array([0.25, -0.5])
        found = decryptor.decrypt(encryptor.encrypt(values), 2)
    assert abs(found - values).max() <= epoch.parameters.error_bound()
    assert (await actions(keymanager))[-1] == ("fetch-secret", "epoch 1", "granted")


async def test_sealed_secrets_open_for_that_agent_epoch_and_federation_only(keymanager: KeyManager) -> None:
    _, sealed = await keymanager.fetch_epoch(AGENT, 1, KEY.public_bytes())
    assert open_secrets(sealed, KEY, FEDERATION, 1, "agent-1")
    for key, federation, epoch, agent in [
        (SealingKey.generate(), FEDERATION, 1, "agent-1"),
        (KEY, "banks", 1, "agent-1"),
        (KEY, FEDERATION, 2, "agent-1"),
        (KEY, FEDERATION, 1, "agent-2"),
    ]:
        with pytest.raises(MalformedPayload, match="does not open"):
            open_secrets(sealed, key, federation, epoch, agent)


@pytest.mark.parametrize("caller", [AGGREGATOR, OPERATOR, Identity(FEDERATION, Role.KEYMANAGER, "keymanager")])
async def test_no_other_role_gets_secrets(keymanager: KeyManager, caller: Identity) -> None:
    with pytest.raises(RoleDenied, match=f"expected agent, got {caller.role.value}"):
        await keymanager.fetch_epoch(caller, 0, KEY.public_bytes())
    assert (await actions(keymanager))[-1] == ("denied", "fetch-secret epoch current", "role_denied")
    epoch, sealed = await keymanager.fetch_epoch(caller, 0)
    assert (epoch.number, sealed) == (1, b"")
    assert (await actions(keymanager))[-1] == ("fetch-public", "epoch 1", "granted")


async def test_not_even_the_local_command_line_gets_secrets(keymanager: KeyManager) -> None:
    with pytest.raises(RoleDenied, match="got local"):
        await keymanager.fetch_epoch(None, 0, KEY.public_bytes())


async def test_a_bad_hpke_key_is_refused(keymanager: KeyManager) -> None:
    with pytest.raises(MalformedPayload, match="1216 bytes, got 5"):
        await keymanager.fetch_epoch(AGENT, 0, b"short")
    assert (await actions(keymanager))[-1] == ("denied", "fetch-secret epoch current", "malformed_payload")


async def test_rotation_makes_new_keys_and_keeps_the_old_readable(keymanager: KeyManager) -> None:
    before = await keymanager.fetch_epoch(AGENT, 0, KEY.public_bytes())
    rotated = await keymanager.rotate_epoch(OPERATOR, "scheduled")
    assert (rotated.number, rotated.state) == (2, EpochState.CURRENT)
    old, old_sealed = await keymanager.fetch_epoch(AGENT, 1, KEY.public_bytes())
    new, new_sealed = await keymanager.fetch_epoch(AGENT, 0, KEY.public_bytes())
    assert (old.state, new.number) == (EpochState.SUPERSEDED, 2)
    old_secrets = open_secrets(old_sealed, KEY, FEDERATION, 1, "agent-1")
    new_secrets = open_secrets(new_sealed, KEY, FEDERATION, 2, "agent-1")
    assert old_secrets == open_secrets(before[1], KEY, FEDERATION, 1, "agent-1")
    assert old_secrets[0] != new_secrets[0]
    assert old_secrets[1] != new_secrets[1]
    assert old.public_key != new.public_key
    listed = await keymanager.list_epochs(AGENT)
    assert [(epoch.number, epoch.state.value) for epoch in listed] == [(2, "current"), (1, "superseded")]
    assert ("rotate", "epoch 2: scheduled", "granted") in await actions(keymanager)


async def test_rotations_at_once_leave_one_current_epoch(keymanager: KeyManager) -> None:
    made = await asyncio.gather(*(keymanager.rotate_epoch(OPERATOR, "race") for _ in range(4)))
    assert sorted(epoch.number for epoch in made) == [2, 3, 4, 5]
    states = [epoch.state for epoch in await keymanager.list_epochs(OPERATOR)]
    assert states == [EpochState.CURRENT] + [EpochState.SUPERSEDED] * 4


async def test_a_retired_epoch_has_no_secrets_left(keymanager: KeyManager, tmp_path: Path) -> None:
    config = keymanager_config(tmp_path)
    secrets_before = await stored_secrets(config)
    await keymanager.rotate_epoch(OPERATOR, "")
    retired = await keymanager.retire_epoch(OPERATOR, 1)
    assert retired.state is EpochState.RETIRED
    assert await keymanager.retire_epoch(OPERATOR, 1) == retired
    with pytest.raises(WrongEpoch, match="got a retired one"):
        await keymanager.fetch_epoch(AGENT, 1, KEY.public_bytes())
    public, empty = await keymanager.fetch_epoch(AGENT, 1)
    assert (public.number, empty) == (1, b"")
    assert not set(secrets_before) & set(await stored_secrets(config))
    assert [action for action, *_ in await actions(keymanager)].count("retire") == 1


async def test_not_even_the_sealed_secrets_of_a_retired_epoch_stay_on_disk(tmp_path: Path) -> None:
    async with local_keymanager(tmp_path) as keymanager:
        async with raw_store(keymanager_config(tmp_path)) as (store, _):
            _, sealed = await store.run_tx("epoch", lambda records: records.epoch(1))
        assert sealed is not None
        # SQLite breaks a long value over pages, so look for short pieces of it.
        pieces = {sealed.seed, *(sealed.secret_key[at : at + 64] for at in range(0, 32_000, 1000))}
        await keymanager.rotate_epoch(OPERATOR, "")
    before = b"".join(contents(tmp_path / "state").values())
    found = {piece for piece in pieces if piece in before}
    assert len(found) > 25
    assert sealed.seed in found
    async with local_keymanager(tmp_path) as keymanager:
        await keymanager.retire_epoch(OPERATOR, 1)
    after = b"".join(contents(tmp_path / "state").values())
    assert {piece for piece in pieces if piece in after} == set()


async def test_the_current_epoch_cannot_be_retired(keymanager: KeyManager) -> None:
    with pytest.raises(WrongEpoch, match="rotate first"):
        await keymanager.retire_epoch(OPERATOR, 1)


@pytest.mark.parametrize("number", [2, 4_000_000_000])
async def test_unknown_epochs_are_named(keymanager: KeyManager, number: int) -> None:
    with pytest.raises(UnknownEpoch, match=f"expected one of 1 to 1, got {number}"):
        await keymanager.fetch_epoch(AGENT, number)
    with pytest.raises(UnknownEpoch):
        await keymanager.retire_epoch(OPERATOR, number)


async def test_epoch_zero_cannot_be_retired(keymanager: KeyManager) -> None:
    with pytest.raises(UnknownEpoch, match="from 1, got 0"):
        await keymanager.retire_epoch(OPERATOR, 0)


@pytest.mark.parametrize("caller", [AGENT, AGGREGATOR])
async def test_operators_only(keymanager: KeyManager, caller: Identity) -> None:
    calls = [
        keymanager.rotate_epoch(caller, ""),
        keymanager.retire_epoch(caller, 1),
        keymanager.create_token(caller, Role.AGENT, "agent-9"),
        keymanager.revoke(caller, Role.AGENT, "agent-1", ""),
        keymanager.audit_records(caller),
    ]
    for call in calls:
        with pytest.raises(RoleDenied, match="expected operator"):
            await call
    assert [outcome for *_, outcome in (await actions(keymanager))[-5:]] == ["role_denied"] * 5
    assert [epoch.number for epoch in await keymanager.list_epochs(caller)] == [1]


async def test_who_may_see_revocations(keymanager: KeyManager) -> None:
    assert await keymanager.revocations(AGGREGATOR) == []
    with pytest.raises(RoleDenied):
        await keymanager.revocations(AGENT)


async def test_revocation_rotates_once(keymanager: KeyManager) -> None:
    token = await keymanager.create_token(OPERATOR, Role.AGENT, "agent-1")
    key = ec.generate_private_key(ec.SECP256R1())
    await keymanager.enrol(FEDERATION, token.token, signing_request(key))
    epoch = await keymanager.revoke(OPERATOR, Role.AGENT, "agent-1", "lost")
    assert epoch.number == 2
    assert (await keymanager.revoke(OPERATOR, Role.AGENT, "agent-1", "lost, again")).number == 2
    assert [revocation.identity for revocation in await keymanager.revocations(OPERATOR)] == [AGENT]
    assert [one.number for one in await keymanager.list_epochs(OPERATOR)] == [2, 1]
    assert ("revoke", f"{AGENT.uri}: lost", "granted") in await actions(keymanager)


async def test_revocations_at_once_rotate_once(keymanager: KeyManager) -> None:
    await keymanager.create_token(OPERATOR, Role.AGENT, "agent-1")
    epochs = await asyncio.gather(*(keymanager.revoke(OPERATOR, Role.AGENT, "agent-1", "") for _ in range(4)))
    assert {epoch.number for epoch in epochs} == {2}


async def test_nobody_is_revoked_by_a_typing_error(keymanager: KeyManager) -> None:
    with pytest.raises(UnknownAgent, match="agent-11"):
        await keymanager.revoke(OPERATOR, Role.AGENT, "agent-11", "")
    assert len(await keymanager.list_epochs(OPERATOR)) == 1


async def test_reasons_are_bounded(keymanager: KeyManager) -> None:
    with pytest.raises(ValueOutOfRange, match="at most 200 bytes, got 201"):
        await keymanager.rotate_epoch(OPERATOR, "x" * 201)
    await keymanager.rotate_epoch(OPERATOR, "ä" * 100)


async def test_epochs_survive_a_restart(tmp_path: Path) -> None:
    async with local_keymanager(tmp_path) as first:
        await first.rotate_epoch(OPERATOR, "")
        epochs = await first.list_epochs(OPERATOR)
        before = await stored_secrets(keymanager_config(tmp_path))
    async with local_keymanager(tmp_path) as second:
        assert await second.list_epochs(OPERATOR) == epochs
        assert await second.check_current_keys() == 2
        epoch, sealed = await second.fetch_epoch(AGENT, 0, KEY.public_bytes())
        assert list(open_secrets(sealed, KEY, FEDERATION, epoch.number, "agent-1")) == before[:2]


async def test_secrets_are_nowhere_in_clear_on_disk(keymanager: KeyManager, tmp_path: Path) -> None:
    await keymanager.rotate_epoch(OPERATOR, "")
    secrets = await stored_secrets(keymanager_config(tmp_path))
    secrets.append(keymanager.authority.private_der())
    found = contents(tmp_path)
    assert any(name.endswith("keymanager.db") for name in found)
    assert [name for name, data in found.items() if any(secret[:32] in data for secret in secrets)] == []


async def test_ready_proves_that_everything_opens(keymanager: KeyManager, tmp_path: Path) -> None:
    details = await keymanager.ready()
    assert details["epoch"] == 1
    assert details["authority_days_left"] == 3653
    await execute(tmp_path, "UPDATE epochs SET sealed_seed = sealed_secret_key")
    with pytest.raises(StoredBytesCorrupt, match="seed of epoch 1"):
        await keymanager.ready()


async def test_keys_that_do_not_belong_together_are_found_at_start(keymanager: KeyManager, tmp_path: Path) -> None:
    await keymanager.rotate_epoch(OPERATOR, "")
    await execute(tmp_path, "UPDATE epochs SET public_key = (SELECT public_key FROM epochs WHERE number = 1)")
    with pytest.raises(StoredBytesCorrupt, match="different pairs"):
        await keymanager.check_current_keys()


async def test_a_new_key_encryption_key_takes_over_after_resealing(tmp_path: Path) -> None:
    clock = FakeClock()
    async with local_keymanager(tmp_path, clock) as keymanager:
        await keymanager.rotate_epoch(OPERATOR, "")
        await keymanager.rotate_epoch(OPERATOR, "")
        await keymanager.retire_epoch(OPERATOR, 1)
    before = await stored_secrets(keymanager_config(tmp_path))
    old = (tmp_path / "kek").read_text()
    new = base64.b64encode(bytes(range(32))).decode() + "\n"
    (tmp_path / "kek").write_text(new + old)
    async with opened(keymanager_config(tmp_path), clock) as keymanager:
        assert await keymanager.reseal() == 2
        assert await keymanager.reseal() == 0
    (tmp_path / "kek").write_text(new)
    async with opened(keymanager_config(tmp_path), clock) as keymanager:
        await keymanager.ready()
        await keymanager.verify_audit()
    assert await stored_secrets(keymanager_config(tmp_path)) == before


async def test_another_key_encryption_key_opens_nothing(keymanager: KeyManager, tmp_path: Path) -> None:
    (tmp_path / "kek").unlink()
    config, clock = keymanager_config(tmp_path), FakeClock()
    with pytest.raises(InvalidConfiguration, match="FileNotFoundError"):
        await initialise(config, clock)
    make_key_file(tmp_path / "kek")
    with pytest.raises(StoredBytesCorrupt, match="authority key of clinics"):
        await initialise(config, clock)


async def test_a_state_that_was_never_initialised_is_refused(tmp_path: Path) -> None:
    make_key_file(tmp_path / "kek")
    with pytest.raises(InvalidConfiguration, match="got none") as caught:
        async with opened(keymanager_config(tmp_path), FakeClock()):
            raise AssertionError("opened")
    assert "init" in caught.value.hint
    assert not (tmp_path / "state").exists()


async def test_the_state_of_another_federation_is_refused(keymanager: KeyManager, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfiguration, match="expected clinics, whose state this is, got banks"):
        await initialise(keymanager_config(tmp_path, federation="banks"), FakeClock())
    assert (await keymanager.list_epochs(None))[0].number == 1
