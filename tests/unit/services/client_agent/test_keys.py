from __future__ import annotations

import asyncio
import dataclasses
import stat
from pathlib import Path

import numpy as np
import pytest

from services.client_agent.keys import KeyRing, check_parameters
from services.client_agent.state import AgentState
from services.common.keymanager_client import FetchedEpoch
from shelora.errors import DigestMismatch, MalformedPayload, PeerUnreachable, UnknownEpoch
from shelora.he.residues import sum_residues
from support.memory_federation import FEDERATION, MemoryKeyManager


@pytest.fixture
def keymanager() -> MemoryKeyManager:
    return MemoryKeyManager(epochs=2)


def ring(keymanager: MemoryKeyManager, folder: Path, agent: str = "a") -> KeyRing:
    async def fetch(number: int, public: bytes) -> FetchedEpoch:
        return await keymanager.fetch(agent, number, public)

    return KeyRing(AgentState(folder), FEDERATION, agent, fetch, threads=1)


async def test_agents_of_an_epoch_open_each_others_sums(keymanager, tmp_path):
    keys = [await ring(keymanager, tmp_path / name, name).epoch(1) for name in ("a", "b")]
    values = np.linspace(-1, 1, 5000)
    blocks = sum_residues([one.encryptor.encrypt(values) for one in keys], keys[0].parameters.modulus)
    for one in keys:
        np.testing.assert_allclose(one.decryptor.decrypt(blocks, 5000), 2 * values, atol=1e-8)
    assert keys[0].seed == keys[1].seed
    assert keys[0].seed.expose() == keymanager.seed(1)


async def test_an_epoch_is_fetched_once_even_by_many(keymanager, tmp_path):
    keyring = ring(keymanager, tmp_path)
    first, again = await asyncio.gather(keyring.epoch(1), keyring.epoch(1))
    assert first is again
    assert (await keyring.epoch(2)).number == 2
    assert keymanager.fetches == [1, 2]


async def test_a_stored_epoch_opens_while_the_key_manager_is_away(keymanager, tmp_path):
    before = ring(keymanager, tmp_path)
    blocks = (await before.epoch(1)).encryptor.encrypt(np.full(3, 0.5))
    before.close()
    keymanager.away = True
    after = ring(keymanager, tmp_path)
    keys = await after.epoch(1)
    np.testing.assert_allclose(keys.decryptor.decrypt(blocks, 3), 0.5, atol=1e-8)
    assert keys.seed.expose() == keymanager.seed(1)
    assert keymanager.fetches == [1]
    with pytest.raises(PeerUnreachable):
        await after.epoch(2)
    keymanager.away = False
    assert (await after.epoch(2)).number == 2


async def test_nothing_secret_lies_in_the_clear(keymanager, tmp_path):
    await ring(keymanager, tmp_path).epoch(1)
    secret, seed = keymanager.pair(1).secret.expose(), keymanager.seed(1)
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        data = path.read_bytes()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert secret[:64] not in data
        assert seed not in data


async def test_an_epoch_without_secrets_is_refused(keymanager, tmp_path):
    async def fetch(number: int, public: bytes) -> FetchedEpoch:
        fetched = await keymanager.fetch("a", number, public)
        return dataclasses.replace(fetched, sealed_secrets=b"", state="retired")

    keyring = KeyRing(AgentState(tmp_path), FEDERATION, "a", fetch, threads=1)
    with pytest.raises(UnknownEpoch, match="epoch 1 \\(retired\\)"):
        await keyring.epoch(1)
    assert not list(tmp_path.rglob("sealed"))
    with pytest.raises(UnknownEpoch, match="no epoch 9"):
        await ring(keymanager, tmp_path).epoch(9)


async def test_secrets_for_another_agent_do_not_open(keymanager, tmp_path):
    async def fetch(number: int, public: bytes) -> FetchedEpoch:
        return await keymanager.fetch("somebody-else", number, public)

    keyring = KeyRing(AgentState(tmp_path), FEDERATION, "a", fetch, threads=1)
    with pytest.raises(MalformedPayload, match="does not open"):
        await keyring.epoch(1)
    assert not list(tmp_path.rglob("sealed"))


@pytest.mark.parametrize("damage", ["hpke.key", "epochs/1/public", "epochs/1/epoch.json"])
async def test_what_is_lost_is_fetched_again(keymanager, tmp_path, damage):
    await ring(keymanager, tmp_path).epoch(1)
    (tmp_path / damage).unlink()
    assert (await ring(keymanager, tmp_path).epoch(1)).seed.expose() == keymanager.seed(1)
    assert keymanager.fetches == [1, 1]


async def test_another_library_build_is_refused(keymanager, tmp_path):
    async def fetch(number: int, public: bytes) -> FetchedEpoch:
        fetched = await keymanager.fetch("a", number, public)
        return dataclasses.replace(fetched, parameters=dataclasses.replace(fetched.parameters, scale_bits=49))

    with pytest.raises(DigestMismatch, match="CKKS parameters"):
        await KeyRing(AgentState(tmp_path), FEDERATION, "a", fetch, threads=1).epoch(1)


async def test_a_plan_for_other_parameters_is_refused(keymanager, tmp_path):
    keys = await ring(keymanager, tmp_path).epoch(1)
    check_parameters(keys, keymanager.context.parameters.digest())
    with pytest.raises(DigestMismatch, match="epoch 1 has"):
        check_parameters(keys, bytes(32))
