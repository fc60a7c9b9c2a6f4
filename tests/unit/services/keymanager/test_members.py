from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from services.common.identity import Identity, Role, certificate_identity
from services.common.keymanager_client import EnrolmentToken
from services.keymanager.members import token_digest
from services.keymanager.service import KeyManager
from services.keymanager.store import Records
from shelora.errors import (
    AgentRevoked,
    InvalidConfiguration,
    InvalidIdentifier,
    InvalidToken,
    MalformedPayload,
    RoleDenied,
    SheLoraError,
    UnknownAgent,
    UnknownFederation,
    ValueOutOfRange,
)
from support.clock import FakeClock
from support.keymanager import FEDERATION, keymanager_config, local_keymanager, raw_store, signing_request

OPERATOR = Identity(FEDERATION, Role.OPERATOR, "alice")
AGENT = Identity(FEDERATION, Role.AGENT, "agent-1")
KEY = ec.generate_private_key(ec.SECP256R1())


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def keymanager(tmp_path: Path, clock: FakeClock) -> AsyncIterator[KeyManager]:
    async with local_keymanager(tmp_path, clock) as found:
        yield found


async def token_for(keymanager: KeyManager, ttl_s: int = 3600, name: str = "agent-1") -> EnrolmentToken:
    return await keymanager.create_token(OPERATOR, Role.AGENT, name, ttl_s)


async def last_record(keymanager: KeyManager) -> tuple[str, str, str, str]:
    record = (await keymanager.audit_records(OPERATOR, 0, 1000))[-1]
    return record.actor, record.action, record.subject, record.outcome


async def test_a_token_gives_a_certificate_for_the_identity_it_names(keymanager: KeyManager) -> None:
    token = await token_for(keymanager)
    issued = await keymanager.enrol(FEDERATION, token.token, signing_request(KEY))
    leaf = x509.load_pem_x509_certificate(issued.certificate_pem.encode())
    assert certificate_identity(leaf) == AGENT
    assert leaf.public_key() == KEY.public_key()
    assert issued.authority_pem == token.authority_pem
    actor, action, subject, outcome = await last_record(keymanager)
    assert (actor, action, outcome) == (AGENT.uri, "enrol", "granted")
    assert issued.serial in subject


async def test_the_same_token_and_key_work_until_the_token_expires(keymanager: KeyManager, clock: FakeClock) -> None:
    token = await token_for(keymanager, ttl_s=600)
    first = await keymanager.enrol(FEDERATION, token.token, signing_request(KEY))
    clock.advance(599)
    again = await keymanager.enrol(FEDERATION, token.token, signing_request(KEY))
    assert again.serial != first.serial
    assert again.not_after_ms == first.not_after_ms + 599_000
    clock.advance(1)
    with pytest.raises(InvalidToken, match="expired"):
        await keymanager.enrol(FEDERATION, token.token, signing_request(KEY))


async def test_a_used_token_is_worthless_with_another_key(keymanager: KeyManager) -> None:
    token = await token_for(keymanager)
    await keymanager.enrol(FEDERATION, token.token, signing_request(KEY))
    with pytest.raises(InvalidToken, match="another key"):
        await keymanager.enrol(FEDERATION, token.token, signing_request())
    expected = ("anonymous", "denied", f"enrol by {AGENT.uri}", "invalid_token")
    assert await last_record(keymanager) == expected
    await keymanager.enrol(FEDERATION, token.token, signing_request(KEY))


async def test_of_many_keys_at_once_exactly_one_wins_a_token(keymanager: KeyManager) -> None:
    token = await token_for(keymanager)
    answers = await asyncio.gather(
        *(keymanager.enrol(FEDERATION, token.token, signing_request()) for _ in range(8)), return_exceptions=True
    )
    assert sum(isinstance(answer, InvalidToken) for answer in answers) == 7


@pytest.mark.parametrize("token", ["", "short", "ä" * 20, "x" * 129, "x" * 43])
async def test_unknown_tokens_are_refused_and_recorded(keymanager: KeyManager, token: str) -> None:
    with pytest.raises(InvalidToken) as caught:
        await keymanager.enrol(FEDERATION, token, signing_request(KEY))
    assert "operator" in caught.value.hint
    assert await last_record(keymanager) == ("anonymous", "denied", "enrol", "invalid_token")


async def test_a_token_is_stored_as_a_digest_only(keymanager: KeyManager, tmp_path: Path) -> None:
    token = await token_for(keymanager)
    assert len(token.token) >= 43
    for file in (tmp_path / "state").iterdir():
        assert token.token.encode() not in file.read_bytes()
    assert token.token not in repr(token)


async def test_enrolment_names_its_federation(keymanager: KeyManager) -> None:
    token = await token_for(keymanager)
    with pytest.raises(UnknownFederation, match="expected clinics, got 'banks'"):
        await keymanager.enrol("banks", token.token, signing_request(KEY))


async def test_a_bad_signing_request_does_not_use_the_token_up(keymanager: KeyManager) -> None:
    token = await token_for(keymanager)
    with pytest.raises(MalformedPayload):
        await keymanager.enrol(FEDERATION, token.token, b"nonsense")
    await keymanager.enrol(FEDERATION, token.token, signing_request(KEY))


async def test_an_expired_token_is_forgotten_when_the_next_is_made(
    keymanager: KeyManager, clock: FakeClock, tmp_path: Path
) -> None:
    old = await token_for(keymanager, ttl_s=60)
    clock.advance(61)
    new = await token_for(keymanager)
    async with raw_store(keymanager_config(tmp_path)) as (store, _):
        known = [
            await store.run_tx("token", functools.partial(Records.token, digest=token_digest(token)))
            for token in (old.token, new.token)
        ]
    assert known[0] is None
    assert known[1] is not None


async def test_renewal_keeps_identity_and_server_names(keymanager: KeyManager) -> None:
    token = await keymanager.create_token(OPERATOR, Role.AGGREGATOR, "main", 60, ("agg.example.org", "::1"))
    await keymanager.enrol(FEDERATION, token.token, signing_request(KEY))
    aggregator = Identity(FEDERATION, Role.AGGREGATOR, "main")
    other_key = ec.generate_private_key(ec.SECP256R1())
    issued = await keymanager.renew(aggregator, signing_request(other_key))
    leaf = x509.load_pem_x509_certificate(issued.certificate_pem.encode())
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["agg.example.org"]
    assert certificate_identity(leaf) == aggregator
    assert leaf.public_key() == other_key.public_key()
    assert (await last_record(keymanager))[:2] == (aggregator.uri, "renew")


async def test_only_enrolled_members_of_this_federation_renew(keymanager: KeyManager) -> None:
    with pytest.raises(UnknownAgent, match="agent-1"):
        await keymanager.renew(AGENT, signing_request(KEY))
    with pytest.raises(RoleDenied, match="expected clinics, got banks"):
        await keymanager.renew(Identity("banks", Role.AGENT, "agent-1"), signing_request(KEY))


async def test_a_revoked_identity_is_refused_everywhere(keymanager: KeyManager) -> None:
    token = await token_for(keymanager)
    await keymanager.enrol(FEDERATION, token.token, signing_request(KEY))
    await keymanager.revoke(OPERATOR, Role.AGENT, "agent-1", "lost device")
    with pytest.raises(AgentRevoked):
        await keymanager.enrol(FEDERATION, token.token, signing_request(KEY))
    assert await last_record(keymanager) == ("anonymous", "denied", f"enrol by {AGENT.uri}", "agent_revoked")
    with pytest.raises(AgentRevoked):
        await keymanager.renew(AGENT, signing_request(KEY))
    with pytest.raises(AgentRevoked):
        await keymanager.fetch_epoch(AGENT, 0)
    with pytest.raises(AgentRevoked):
        await keymanager.list_epochs(AGENT)
    with pytest.raises(AgentRevoked):
        await token_for(keymanager)
    assert await last_record(keymanager) == (
        OPERATOR.uri,
        "denied",
        f"token for agent agent-1 by {AGENT.uri}",
        "agent_revoked",
    )
    await token_for(keymanager, name="agent-2")


@pytest.mark.parametrize(
    ("role", "name", "ttl_s", "server_names", "error"),
    [
        (Role.AGENT, "Agent_1", 0, (), InvalidIdentifier),
        (Role.AGENT, "", 0, (), InvalidIdentifier),
        (Role.KEYMANAGER, "keymanager", 0, ("localhost",), InvalidIdentifier),
        (Role.AGENT, "agent-1", 59, (), ValueOutOfRange),
        (Role.AGENT, "agent-1", 2_592_001, (), ValueOutOfRange),
        (Role.AGENT, "agent-1", 0, ("localhost",), InvalidConfiguration),
        (Role.AGGREGATOR, "main", 0, (), InvalidConfiguration),
    ],
)
async def test_impossible_tokens_are_refused_and_recorded(
    keymanager: KeyManager, role: Role, name: str, ttl_s: int, server_names: tuple[str, ...], error: type[SheLoraError]
) -> None:
    with pytest.raises(error):
        await keymanager.create_token(OPERATOR, role, name, ttl_s, server_names)
    actor, action, _, outcome = await last_record(keymanager)
    assert (actor, action, outcome) == (OPERATOR.uri, "denied", error.code)


async def test_a_token_lasts_a_day_unless_told_otherwise(keymanager: KeyManager, clock: FakeClock) -> None:
    assert (await token_for(keymanager, ttl_s=0)).expires_at_ms == clock.now_ms() + 86_400_000
