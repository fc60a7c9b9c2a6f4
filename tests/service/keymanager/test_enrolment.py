"""Enrolment and renewal over real TLS, and what happens when they are cut short."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from services.common.clock import SystemClock
from services.common.enrolment import Enrolment, ensure_identity, renew_forever, renew_identity
from services.common.identity import Identity, Role
from services.common.keymanager_client import EnrolledCertificate, enrol
from services.common.member_key import check_answer, load_key, load_or_make_key
from services.common.tls import IdentityFiles
from services.keymanager.ca import Authority
from shelora.errors import (
    AgentRevoked,
    IdentityConflict,
    InvalidConfiguration,
    InvalidToken,
    PeerUnreachable,
    UnknownFederation,
)
from support.clock import FakeClock
from support.keymanager import FEDERATION, Running, serving_keymanager, signing_request

CLOCK = SystemClock()


def saved(enrolment: Enrolment, path: Path) -> Path:
    enrolment.save(path)
    return path


async def test_enrolling_twice_is_enrolling_once(running: Running, tmp_path: Path) -> None:
    file = saved(await running.enrolment(Role.AGENT, "agent-1"), tmp_path / "agent.json")
    files = await ensure_identity(tmp_path / "identity", file, CLOCK)
    assert files.identity() == Identity(FEDERATION, Role.AGENT, "agent-1")
    assert files.key.stat().st_mode & 0o777 == 0o600
    before = files.read()
    assert (await ensure_identity(tmp_path / "identity", file, CLOCK)).read() == before
    file.unlink()
    assert (await ensure_identity(tmp_path / "identity", file, CLOCK)).read() == before
    assert (await ensure_identity(tmp_path / "identity", None, CLOCK)).read() == before


async def test_a_crash_after_the_key_was_written_is_harmless(running: Running, tmp_path: Path) -> None:
    file = saved(await running.enrolment(Role.AGENT, "agent-1"), tmp_path / "agent.json")
    key = load_or_make_key(IdentityFiles(tmp_path / "identity"))
    files = await ensure_identity(tmp_path / "identity", file, CLOCK)
    assert load_key(files).public_key() == key.public_key()


async def test_a_lost_answer_is_asked_for_again(running: Running, tmp_path: Path) -> None:
    file = saved(await running.enrolment(Role.AGENT, "agent-1"), tmp_path / "agent.json")
    files = await ensure_identity(tmp_path / "identity", file, CLOCK)
    key = files.key.read_bytes()
    files.certificate.unlink()
    again = await ensure_identity(tmp_path / "identity", file, CLOCK)
    assert again.complete()
    assert again.key.read_bytes() == key


async def test_a_stolen_enrolment_file_is_worthless_once_used(running: Running, tmp_path: Path) -> None:
    file = saved(await running.enrolment(Role.AGENT, "agent-1"), tmp_path / "agent.json")
    await ensure_identity(tmp_path / "identity", file, CLOCK)
    with pytest.raises(InvalidToken, match="another key"):
        await ensure_identity(tmp_path / "thief", file, CLOCK)
    assert not IdentityFiles(tmp_path / "thief").certificate.exists()


async def test_an_expired_certificate_is_replaced_with_a_new_token(running: Running, tmp_path: Path) -> None:
    file = saved(await running.enrolment(Role.AGENT, "agent-1"), tmp_path / "agent.json")
    files = await ensure_identity(tmp_path / "identity", file, CLOCK)
    late = FakeClock(files.validity_ms()[1])
    with pytest.raises(InvalidConfiguration, match="an expired certificate"):
        await ensure_identity(tmp_path / "identity", None, late)
    before = files.certificate.read_bytes()
    saved(await running.enrolment(Role.AGENT, "agent-1"), file)
    await ensure_identity(tmp_path / "identity", file, late)
    assert files.certificate.read_bytes() != before


async def test_a_folder_belongs_to_one_member_of_one_federation(running: Running, tmp_path: Path) -> None:
    first = await running.enrolment(Role.AGENT, "agent-1")
    await ensure_identity(tmp_path / "identity", saved(first, tmp_path / "first.json"), CLOCK)
    other = saved(replace(first, name="agent-2"), tmp_path / "other.json")
    with pytest.raises(IdentityConflict, match=r"expected spiffe://clinics/agent/agent-2"):
        await ensure_identity(tmp_path / "identity", other, CLOCK)
    anew = replace(first, authority_pem=Authority.create(FEDERATION, CLOCK.now_ms()).pem)
    with pytest.raises(IdentityConflict, match="another one"):
        await ensure_identity(tmp_path / "identity", saved(anew, tmp_path / "anew.json"), CLOCK)


async def test_patience_with_an_absent_key_manager_ends(running: Running, tmp_path: Path) -> None:
    enrolment = replace(await running.enrolment(Role.AGENT, "agent-1"), enrolment="127.0.0.1:1")
    with pytest.raises(PeerUnreachable):
        await ensure_identity(
            tmp_path / "identity", saved(enrolment, tmp_path / "agent.json"), CLOCK, give_up_after_s=0.0
        )
    assert IdentityFiles(tmp_path / "identity").key.exists()


async def test_the_enrolment_port_names_what_is_wrong(running: Running) -> None:
    enrolment = await running.enrolment(Role.AGENT, "agent-1")
    async with running.enrolment_channel(enrolment.authority_pem) as channel:
        with pytest.raises(UnknownFederation, match="expected clinics"):
            await enrol(channel, "banks", enrolment.token, signing_request())
        with pytest.raises(InvalidToken):
            await enrol(channel, FEDERATION, "x" * 43, signing_request())
        answer = await enrol(channel, FEDERATION, enrolment.token, signing_request())
    assert answer.identity == enrolment.identity.uri


async def test_renewal_gives_a_fresh_certificate_for_the_same_key(running: Running) -> None:
    files = await running.member(Role.AGGREGATOR, "main")
    key, before, _ = files.read()
    not_after_ms = await renew_identity(files, running.address, CLOCK)
    assert files.validity_ms()[1] == not_after_ms
    assert files.key.read_bytes() == key
    assert files.certificate.read_bytes() != before
    leaf = x509.load_pem_x509_certificate(files.certificate.read_bytes())
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]


async def test_a_revoked_member_stops_renewing(running: Running) -> None:
    files = await running.member(Role.AGENT, "agent-1")
    operator = await running.member(Role.OPERATOR, "alice")
    async with running.client(operator) as client:
        await client.revoke(Role.AGENT, "agent-1", "lost")
    before = files.read()
    with pytest.raises(AgentRevoked):
        await renew_identity(files, running.address, CLOCK)
    begin_ms, end_ms = files.validity_ms()
    with pytest.raises(AgentRevoked):
        await renew_forever(files, running.address, FakeClock((begin_ms + 3 * end_ms) // 4))
    assert files.read() == before


async def test_certificates_are_renewed_at_two_thirds_of_their_life(running: Running) -> None:
    files = await running.member(Role.AGENT, "agent-1")
    before = files.certificate.read_bytes()
    begin_ms, end_ms = files.validity_ms()
    clock = FakeClock(begin_ms)
    renewed: asyncio.Queue[bytes] = asyncio.Queue()

    async def note() -> None:
        await renewed.put(files.certificate.read_bytes())

    task = asyncio.create_task(renew_forever(files, running.address, clock, on_renewed=note))
    due_s = (end_ms - begin_ms) / 1000 * 2 / 3
    while clock.now_ms() < begin_ms + (due_s - 1) * 1000:
        await clock.advance(min(600.0, due_s - 1 - (clock.now_ms() - begin_ms) / 1000))
    assert renewed.empty()
    await clock.advance(2)
    assert await asyncio.wait_for(renewed.get(), 20) != before
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_renewal_outlives_an_absent_key_manager(tmp_path: Path) -> None:
    async with serving_keymanager(tmp_path) as first:
        files = await first.member(Role.AGENT, "agent-1")
    begin_ms, end_ms = files.validity_ms()
    clock = FakeClock((begin_ms + 3 * end_ms) // 4)
    done = asyncio.Event()

    async def note() -> None:
        done.set()

    task = asyncio.create_task(renew_forever(files, first.address, clock, on_renewed=note, rng=random.Random(1)))
    while not clock.sleepers:  # noqa: ASYNC110 - a real connection attempt has to fail first, nobody tells when
        await asyncio.sleep(0.01)
    assert not done.is_set()
    changes: dict[str, Any] = {"listen": first.address, "enrolment_listen": first.enrolment_address}
    async with serving_keymanager(tmp_path, **changes):
        await clock.advance(400)
        await asyncio.wait_for(done.wait(), 20)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_an_answer_that_is_not_ours_is_not_written(running: Running) -> None:
    files = await running.member(Role.AGENT, "agent-1")
    stranger = await running.member(Role.AGENT, "agent-2")
    authority = files.authority.read_text()
    key = load_key(files)
    foreign = Authority.create(FEDERATION, CLOCK.now_ms())
    forged = foreign.issue(files.identity(), key.public_key(), now_ms=CLOCK.now_ms(), lifetime_s=60)
    own = files.certificate.read_text()
    cases = {
        "another key": EnrolledCertificate(stranger.certificate.read_text(), authority, "", 0),
        "expected one signed by": EnrolledCertificate(forged.certificate_pem, authority, "", 0),
        "expected spiffe": EnrolledCertificate(own, foreign.pem, "", 0),
        "got another one": EnrolledCertificate("no certificate", authority, "", 0),
    }
    for message, answer in cases.items():
        with pytest.raises(IdentityConflict, match=message):
            check_answer(answer, key, files.identity(), authority)
    check_answer(EnrolledCertificate(own, authority, "", 0), key, files.identity(), authority)
