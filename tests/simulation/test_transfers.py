from __future__ import annotations

import asyncio
from dataclasses import replace

import anyio
import pytest

from services.aggregator import residue_sums
from services.aggregator.domain import DownloadRequest, PayloadKind
from services.aggregator.payloads import UploadChecks
from services.aggregator.service import AggregatorService, ServiceLimits
from services.aggregator.uploads import UploadLimits
from services.common.digests import digest_of
from services.common.threads import WorkerPool
from services.common.transfer import Piece
from shelora.errors import (
    ChecksumMismatch,
    ConflictingResend,
    DigestMismatch,
    Draining,
    FederationEnded,
    MalformedPayload,
    NonFiniteValue,
    NotInCohort,
    OffsetMismatch,
    PayloadTooLarge,
    RankMismatch,
    ResidueOutOfRange,
    SizeMismatch,
    StalePlan,
    UnknownAgent,
    UnknownBlob,
    UnknownRound,
    ValueOutOfRange,
    WrongEpoch,
    WrongPhase,
)
from simulation.devices import FEDERATION, digits
from simulation.world import piece


async def pieces(*parts: Piece):
    for part in parts:
        yield part


async def everybody_acts(world, devices=None) -> None:
    for device in devices or world.devices[:3]:
        await world.act(device)
    await world.work()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"plan_version": 2}, StalePlan),
        ({"epoch": 2}, WrongEpoch),
        ({"plan_digest": bytes(32)}, DigestMismatch),
        ({"round": 2}, UnknownRound),
        ({"round": 2**32 - 1}, UnknownRound),
        ({"round": 0}, MalformedPayload),
        ({"kind": PayloadKind.AVERAGE}, MalformedPayload),
        ({"kind": PayloadKind.CIPHER}, WrongPhase),
        ({"kind": PayloadKind.SENSITIVITY, "round": 0}, ConflictingResend),
        ({"kind": PayloadKind.VOTES, "round": 0}, WrongPhase),
        ({"kind": PayloadKind.SENSITIVITY, "round": 0, "plan_version": 2**32 - 1}, WrongPhase),
        ({"examples": 0}, ValueOutOfRange),
        ({"examples": 10**12 + 1}, ValueOutOfRange),
        ({"size_bytes": -1}, ValueOutOfRange),
        ({"size_bytes": 10**9}, PayloadTooLarge),
        ({"digest": b"short"}, MalformedPayload),
        ({"metrics": {"loss": float("nan")}}, NonFiniteValue),
    ],
)
async def test_upload_that_does_not_fit_is_refused_before_its_bytes(training, changes, error):
    device = training.devices[0]
    payload = await training.wanted(device)
    before = (await training.service.ledger.read(FEDERATION)).state
    with pytest.raises(error):
        await training.service.upload(device.identity, replace(payload.ticket, **changes), pieces())
    assert (await training.service.ledger.read(FEDERATION)).state == before
    assert not training.blobs.keys(f"{FEDERATION}/r")


async def test_ciphertext_of_another_layout_is_refused(training):
    await everybody_acts(training)
    device = training.devices[0]
    payload = await training.wanted(device)
    with pytest.raises(DigestMismatch, match="layout"):
        await training.service.upload(device.identity, replace(payload.ticket, layout_digest=bytes(32)), pieces())


async def test_strangers_and_late_agents_are_told_apart(training):
    await everybody_acts(training)
    payload = await training.wanted(training.devices[0])
    late = training.devices[4]
    with pytest.raises(UnknownAgent):
        await training.service.upload(late.identity, payload.ticket, pieces())
    await training.register(late)
    with pytest.raises(NotInCohort):
        await training.service.upload(late.identity, payload.ticket, pieces())
    assert await training.wanted(late) is None


async def test_votes_are_refused_where_sensitivities_are_asked_for(running):
    device = running.devices[0]
    payload = await running.wanted(device)
    with pytest.raises(WrongPhase, match="expected sensitivity"):
        await running.service.upload(device.identity, replace(payload.ticket, kind=PayloadKind.VOTES), pieces())


async def test_operator_s_limit_holds_whatever_the_plan_allows(training):
    checks = UploadChecks(WorkerPool(1))
    limits = ServiceLimits(uploads=UploadLimits(max_payload_bytes=10))
    service = AggregatorService(training.database, training.blobs, checks, training.clock, limits)
    device = training.devices[0]
    payload = await training.wanted(device)
    with pytest.raises(PayloadTooLarge, match="at most 10 bytes"):
        await service.upload(device.identity, payload.ticket, pieces())


async def test_cut_upload_goes_on_where_it_ended_also_after_a_restart(training):
    device = training.devices[0]
    payload = await training.wanted(device)
    with pytest.raises(SizeMismatch, match="so far"):
        await training.service.upload(device.identity, payload.ticket, pieces(piece(0, payload.data[:100])))
    await training.restart()
    assert (await training.service.get_upload(device.identity, payload.ticket)).staged_bytes == 100
    with pytest.raises(OffsetMismatch):
        await training.send(device, payload, 99)
    assert not await training.send(device, payload, 100)
    assert (await training.service.get_upload(device.identity, payload.ticket)).complete


async def test_more_bytes_than_announced_are_refused_and_forgotten(training):
    device = training.devices[0]
    payload = await training.wanted(device)
    with pytest.raises(SizeMismatch, match="or more"):
        await training.service.upload(device.identity, payload.ticket, pieces(piece(0, payload.data + b"x")))
    assert (await training.service.get_upload(device.identity, payload.ticket)).staged_bytes == 0


async def test_other_bytes_than_announced_are_refused_and_forgotten(training):
    device = training.devices[0]
    payload = await training.wanted(device)
    with pytest.raises(ChecksumMismatch):
        await training.service.upload(device.identity, payload.ticket, pieces(piece(0, payload.data[::-1])))
    assert (await training.service.get_upload(device.identity, payload.ticket)).staged_bytes == 0
    assert not await training.send(device, payload)


async def test_before_it_is_accepted_a_payload_may_be_made_again(training):
    """An agent that lost its disk trains again; what it had staged before is dropped."""
    device = training.devices[0]
    payload = await training.wanted(device)
    with pytest.raises(SizeMismatch):
        await training.service.upload(device.identity, payload.ticket, pieces(piece(0, payload.data[:100])))
    data = device.factors(99)
    ticket = replace(payload.ticket, size_bytes=len(data), digest=digest_of(data))
    assert (await training.service.get_upload(device.identity, ticket)).staged_bytes == 0
    assert not (await training.service.upload(device.identity, ticket, pieces(piece(0, data)))).duplicate
    assert not list((training.folder / "blobs" / "staging").iterdir())


async def test_two_streams_with_the_same_bytes_count_once(training):
    device = training.devices[0]
    payload = await training.wanted(device)
    results = await asyncio.gather(
        *(training.service.upload(device.identity, payload.ticket, pieces(piece(0, payload.data))) for _ in range(3)),
        return_exceptions=True,
    )
    accepted = [result for result in results if not isinstance(result, BaseException)]
    assert [receipt.duplicate for receipt in accepted].count(False) == 1
    assert all(isinstance(result, OffsetMismatch) for result in results if isinstance(result, BaseException))
    await training.check()


async def test_what_one_stream_showed_says_nothing_about_the_bytes_of_another(running, monkeypatch):
    """Good residues come, are dropped for another payload, and bad ones take their place under the announced digest."""
    monkeypatch.setattr(residue_sums, "READ_BYTES", 1)
    device = running.devices[0]
    good = await running.wanted(device)
    bad = b"\xff" * len(good.data)
    ticket, other = (replace(good.ticket, digest=digest_of(data)) for data in (bad, good.data))
    ends = {"good": asyncio.Event(), "bad": asyncio.Event()}

    async def held(name, data):
        yield piece(0, data)
        await ends[name].wait()

    def staged():
        return {path.read_bytes() for path in (running.folder / "blobs" / "staging").iterdir()}

    async def until_staged(data):
        with anyio.fail_after(10):
            while data not in staged():  # noqa: ASYNC110  # the service tells nobody
                await asyncio.sleep(0.01)

    first = asyncio.create_task(running.service.upload(device.identity, ticket, held("good", good.data)))
    await until_staged(good.data)
    with pytest.raises(SizeMismatch, match="so far"):
        await running.service.upload(device.identity, other, pieces(piece(0, good.data[:8])))
    second = asyncio.create_task(running.service.upload(device.identity, ticket, held("bad", bad)))
    await until_staged(bad)
    ends["good"].set()
    with pytest.raises(ResidueOutOfRange):
        await first
    ends["bad"].set()
    with pytest.raises(SizeMismatch):
        await second
    assert not await running.send(device, good)


async def test_an_upload_has_its_turn_until_it_is_accepted(training, monkeypatch):
    """Uploads that only wait for the disk count among those under way."""
    uploads, gate, asked = training.service._uploads, asyncio.Event(), []
    checked = uploads._checks.check

    async def slowly(*arguments):
        await gate.wait()
        return await checked(*arguments)

    monkeypatch.setattr(uploads._checks, "check", slowly)
    uploads._turns = asyncio.Semaphore(2)

    async def send(device):
        payload = await training.wanted(device)

        async def asked_for():
            asked.append(device.name)
            yield piece(0, payload.data)

        return await training.service.upload(device.identity, payload.ticket, asked_for())

    sending = [asyncio.create_task(send(device)) for device in training.devices[:3]]
    with anyio.fail_after(10):
        while not (len(asked) == 2 and len(uploads._finishing) == 2):  # noqa: ASYNC110  # the service tells nobody
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    assert len(asked) == 2
    gate.set()
    assert [receipt.duplicate for receipt in await asyncio.gather(*sending)] == [False] * 3
    assert len(asked) == 3


async def test_registration_that_changes_during_an_upload_makes_it_void(training):
    device = training.devices[0]
    payload = await training.wanted(device)

    async def slowly():
        yield piece(0, payload.data[:50])
        await training.service.register_agent(device.identity, replace(device.registration(), rank=2))
        yield piece(50, payload.data[50:])

    with pytest.raises(RankMismatch, match="registration"):
        await training.service.upload(device.identity, payload.ticket, slowly())
    assert not training.blobs.keys(f"{FEDERATION}/r")


async def test_round_that_ends_during_an_upload_refuses_the_rest(training):
    device = training.devices[0]
    payload = await training.wanted(device)

    async def slowly():
        yield piece(0, payload.data[:50])
        await training.wait(100)
        yield piece(50, payload.data[50:])

    with pytest.raises(WrongPhase, match="over"):
        await training.service.upload(device.identity, payload.ticket, slowly())
    assert not list((training.folder / "blobs" / "staging").iterdir())


async def test_uploads_end_when_the_service_drains_or_the_federation_stops(training):
    device = training.devices[0]
    payload = await training.wanted(device)
    await training.service.close()
    with pytest.raises(Draining):
        await training.send(device, payload)
    await training.restart()
    await training.service.stop_federation(FEDERATION, "enough")
    with pytest.raises(FederationEnded):
        await training.send(device, payload)


async def test_projection_is_for_members_once_the_cohort_is_closed(training):
    device, late = training.devices[0], training.devices[4]
    request = DownloadRequest(FEDERATION, PayloadKind.PROJECTION, 1)
    with pytest.raises(WrongPhase):
        await training.service.open_download(device.identity, request)
    with pytest.raises(UnknownAgent):
        await training.service.open_download(late.identity, request)
    await training.register(late)
    await everybody_acts(training)
    projection = await training.service.open_download(device.identity, request)
    assert [member.agent for member in projection.cohort] == ["agent-0", "agent-1", "agent-2"]
    assert projection.weight == device.examples / sum(each.examples for each in training.devices[:3])
    assert projection.layout_digest == projection.plan.layout([1, 2, 1]).digest()
    with pytest.raises(NotInCohort):
        await training.service.open_download(late.identity, request)
    await everybody_acts(training)
    with pytest.raises(UnknownBlob):
        await training.service.open_download(device.identity, request)


@pytest.mark.parametrize("kind", [PayloadKind.AVERAGE, PayloadKind.CIPHER])
async def test_average_is_for_everybody_once_it_is_published(training, kind):
    late = training.devices[4]
    await everybody_acts(training)
    for number in (0, 1, 2, 2**32 - 1):
        with pytest.raises(UnknownRound):
            await training.service.open_download(
                training.devices[0].identity, DownloadRequest(FEDERATION, kind, number)
            )
    await everybody_acts(training)
    await everybody_acts(training)
    await training.register(late)
    download = await training.service.open_download(late.identity, DownloadRequest(FEDERATION, kind, 1, offset=5))
    assert (download.offset, download.weight, download.total_weight) == (5, 0.0, 1.0)
    end = DownloadRequest(FEDERATION, kind, 1, offset=download.blob.size_bytes)
    await training.service.open_download(late.identity, end)
    with pytest.raises(OffsetMismatch):
        await training.service.open_download(late.identity, replace(end, offset=end.offset + 1))
    with pytest.raises(MalformedPayload):
        await training.service.open_download(late.identity, DownloadRequest(FEDERATION, PayloadKind.FACTORS, 1))


async def test_sum_of_sensitivities_is_kept_for_late_agents(running):
    device = running.devices[0]
    request = DownloadRequest(FEDERATION, PayloadKind.SENSITIVITY, plan_version=1)
    with pytest.raises(UnknownBlob):
        await running.service.open_download(device.identity, request)
    await everybody_acts(running)
    await running.restart()
    found = await running.service.open_download(device.identity, request)
    assert found.negotiated_by == 3
    data = running.blobs.path(found.blob.key).read_bytes()
    assert digits(int.from_bytes(data[:8], "little")) == [1, 1, 1, 0, 0]
    for version in (0, 2, 2**32 - 1):
        with pytest.raises(UnknownBlob):
            await running.service.open_download(device.identity, replace(request, plan_version=version))


async def test_figures_of_a_round_outlive_its_uploads(training):
    await everybody_acts(training)
    await everybody_acts(training)
    summary = (await training.service.list_rounds(FEDERATION))[0]
    for device, member in zip(training.devices, summary.members, strict=False):
        assert member.factors_bytes == len(device.payloads[PayloadKind.FACTORS, 1].data)
        assert member.cipher_bytes == len(device.payloads[PayloadKind.CIPHER, 1].data)
        assert member.counted
    assert summary.cipher_bytes > 0
    assert summary.average_bytes > 0
    assert set(summary.phase_seconds) == {"train", "factors", "basis", "cipher", "sum"}
