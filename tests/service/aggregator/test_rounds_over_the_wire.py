"""A federation from creation to its end, over mutual TLS, with exact proof of what was averaged."""

from __future__ import annotations

import asyncio

import httpx
import numpy as np
import pytest
import safetensors.numpy

from services.client_agent.codec import upload_to_proto
from services.client_agent.connection import Connection, UploadRequests
from services.client_agent.domain import PayloadKind, Upload
from services.common.clock import SystemClock
from services.common.codec import plan_from_proto
from services.common.identity import Role
from services.common.transfer import payload_header
from shelora.errors import ConflictingResend, MalformedPayload, SheLoraError, SizeMismatch, UnknownBlob, UnknownRound
from shelora.lora import plaintext_average
from shelora.v1 import aggregator_pb2 as wire
from support.aggregator import FEDERATION, upload_header
from support.rounds import BUDGETS, open_published, send_cipher, send_factors, send_sensitivities
from support.updates import SHAPES, open_residues, sensitivities

COLUMNS = sum(module.in_features for module in SHAPES.modules)


async def test_two_rounds_with_every_budget(aggregator, negotiating, agents, contributions):
    for index, agent in enumerate(agents):
        await send_sensitivities(agent, sensitivities(index))
    for number in (1, 2):
        await asyncio.gather(*(send_factors(agent, contributions[agent.name], number) for agent in agents))
        await asyncio.gather(*(send_cipher(agent, contributions[agent.name], number) for agent in agents))
        for agent in agents:
            await agent.until(wire.AGENT_TASK_LEAVE if number == 2 else wire.AGENT_TASK_FACTORS)
            await agent.report(number, accuracy_before=0.5 + number / 100, accuracy_after=0.6 + number / 100)

    header, total = await agents[0].download(kind=wire.PAYLOAD_KIND_SENSITIVITY, plan_version=1)
    summed = sum(open_residues(sensitivities(index), COLUMNS) for index in range(3))
    np.testing.assert_array_equal(open_residues(total, COLUMNS), summed)
    assert header.plan.negotiated_by == 3

    for number in (1, 2):
        header, average = await agents[1].download(kind=wire.PAYLOAD_KIND_AVERAGE, round=number)
        _, cipher = await agents[2].download(kind=wire.PAYLOAD_KIND_CIPHER, round=number)
        opened = open_published(header, average, cipher, number)
        members = [contributions[name] for name in BUDGETS]
        weights = [member.examples for member in members]
        assert header.total_weight == pytest.approx(1.0)
        for index in range(len(SHAPES.modules)):
            wanted = plaintext_average([member.update.factors[index] for member in members], weights)
            error = np.abs(opened.basis[index] @ opened.core[index] - wanted).max()
            assert error <= 3e-6 * np.abs(wanted).max()
        dense = sum(w * member.update.dense[0] for w, member in zip(weights, members, strict=True)) / sum(weights)
        np.testing.assert_allclose(opened.dense[0], dense, atol=1e-9)

    federation = await negotiating.federation()
    assert federation.state == wire.FEDERATION_STATE_FINISHED
    assert federation.last_published_round == 2
    assert federation.plan.negotiated_by == 3


async def test_what_operators_and_the_dashboard_see(aggregator, negotiating, agents, contributions):
    for agent in agents:
        await send_sensitivities(agent, sensitivities())
    for agent in agents:
        await send_factors(agent, contributions[agent.name], 1)
    for agent in agents:
        await send_cipher(agent, contributions[agent.name], 1)
    await agents[0].until(wire.AGENT_TASK_FACTORS, round_number=2)
    for agent in agents:
        await agent.report(1, accuracy_before=0.5, accuracy_after=0.75)

    async with httpx.AsyncClient(base_url=aggregator.ops_url, trust_env=False) as http:
        page = await http.get("/")
        listed = (await http.get("/api/v1/federations")).json()
        one = (await http.get("/api/v1/federations/ward")).json()
        known = (await http.get("/api/v1/federations/ward/agents")).json()["agents"]
        rounds = (await http.get("/api/v1/federations/ward/rounds")).json()["rounds"]
        second = (await http.get("/api/v1/federations/ward/rounds", params={"after": 1})).json()["rounds"]
        only = (await http.get("/api/v1/federations/ward/rounds", params={"limit": 1})).json()["rounds"]
        beyond = (await http.get("/api/v1/federations/ward/rounds", params={"after": 2})).json()["rounds"]
        wrong = await http.get("/api/v1/federations/ward/rounds", params={"after": -1})
        unknown = await http.get("/api/v1/federations/elsewhere")
        ready = await http.get("/readyz")
        metrics = (await http.get("/metrics")).text

    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert [found["federation"] for found in listed["federations"]] == ["ward"]
    assert one["round"]["number"] == 2
    assert one["state"] == "running"
    assert [(agent["name"], agent["rank"]) for agent in known] == [(name, rank) for name, (rank, _) in BUDGETS.items()]
    assert known[0]["encrypted_share"] == pytest.approx(16 / 65)
    first = rounds[0]
    assert first["phase"] == "published"
    assert [member["counted"] for member in first["members"]] == [True] * 3
    assert first["members"][0]["metrics"]["accuracy_after"] == 0.75
    assert first["average_bytes"] > 0
    assert first["cipher_bytes"] > 0
    assert first["phase_seconds"].keys() >= {"train", "basis", "cipher"}
    assert [found["number"] for found in rounds] == [1, 2]
    assert (second, only, beyond) == (rounds[1:], rounds[:1], [])
    assert wrong.status_code == 422
    assert unknown.status_code == 404
    assert unknown.json()["code"] == "unknown_federation"
    assert ready.status_code == 200
    assert ready.json()["federations"] == ["ward"]
    assert 'shelora_compute_seconds_count{step="basis"} 1.0' in metrics
    assert "shelora_rpc_seconds" in metrics
    assert 'shelora_checked_bytes_total{kind="factors"}' in metrics


async def test_a_resend_is_recognised_and_a_different_one_refused(negotiating, agents):
    view = await agents[0].until(wire.AGENT_TASK_NEGOTIATE)
    first, other = sensitivities(1), sensitivities(2)
    header = upload_header(view, wire.PAYLOAD_KIND_SENSITIVITY, first)

    assert not (await agents[0].upload(header, first)).duplicate
    assert (await agents[0].upload(header, first)).duplicate
    assert (await agents[0].staged(header)).complete
    with pytest.raises(ConflictingResend):
        await agents[0].upload(upload_header(view, wire.PAYLOAD_KIND_SENSITIVITY, other), other)


async def test_an_agent_sends_what_is_missing_of_a_cut_upload(negotiating, agents, aggregator, contributions, tmp_path):
    for agent in agents:
        await send_sensitivities(agent, sensitivities())
    view = await agents[0].until(wire.AGENT_TASK_FACTORS)
    plan = plan_from_proto(view.plan)
    path = tmp_path / "factors"
    path.write_bytes(contributions[agents[0].name].factors(plan))
    upload = Upload(PayloadKind.FACTORS, path, view.round, plan, examples=contributions[agents[0].name].examples)
    header = upload_to_proto(FEDERATION, upload, payload_header(path))
    with pytest.raises(SizeMismatch):
        await agents[0].upload(header, path.read_bytes()[:300])

    sent: list[float] = []
    errors: list[SheLoraError] = []
    files = aggregator.authority.issue(Role.AGENT, agents[0].name)
    async with Connection(
        FEDERATION, aggregator.address, "127.0.0.1:9", files, SystemClock(), errors.append
    ) as connection:
        await connection.upload(upload, lambda fraction, _: sent.append(fraction))
        assert (await agents[0].staged(header)).complete
        assert sent == [1.0, 1.0]
        await connection.upload(upload, lambda fraction, _: sent.append(fraction))
    assert errors == []


@pytest.mark.parametrize("offset", ["-1", "1e3", "", "9" * 21])
def test_a_place_to_begin_is_a_number(tmp_path, offset):
    requests = UploadRequests(wire.UploadHeader(), tmp_path, lambda _fraction, _detail: None)
    requests.continue_at({})
    with pytest.raises(MalformedPayload, match="an offset in bytes to begin at"):
        requests.continue_at({"staged-bytes": offset})


async def test_a_cut_upload_continues_and_a_cut_download_resumes(negotiating, agents, contributions):
    for agent in agents:
        await send_sensitivities(agent, sensitivities())
    view = await agents[0].until(wire.AGENT_TASK_FACTORS)
    contribution = contributions[agents[0].name]
    payload = contribution.factors(plan_from_proto(view.plan))
    header = upload_header(view, wire.PAYLOAD_KIND_FACTORS, payload, examples=contribution.examples)

    with pytest.raises(SizeMismatch, match="got 300 so far"):
        await agents[0].upload(header, payload[:300])
    assert (await agents[0].staged(header)).staged_bytes == 300
    assert (await agents[0].upload(header, payload, offset=300)).accepted_bytes == len(payload)

    for agent in agents[1:]:
        await send_factors(agent, contributions[agent.name], 1)
    await agents[0].until(wire.AGENT_TASK_CIPHER)
    _, whole = await agents[0].download(kind=wire.PAYLOAD_KIND_PROJECTION, round=1)
    part_header, part = await agents[0].download(kind=wire.PAYLOAD_KIND_PROJECTION, round=1, offset=100)
    assert part == whole[100:]
    assert part_header.payload.size_bytes == len(whole)
    assert safetensors.numpy.load(whole)["0.projection"].shape == (9, 2)
    _, nothing = await agents[0].download(kind=wire.PAYLOAD_KIND_PROJECTION, round=1, offset=len(whole))
    assert nothing == b""
    with pytest.raises(UnknownRound):
        await agents[0].download(kind=wire.PAYLOAD_KIND_AVERAGE, round=1)


async def test_a_payload_that_is_gone_is_reported_as_such(aggregator, negotiating, agents):
    for agent in agents:
        await send_sensitivities(agent, sensitivities())
    await agents[0].until(wire.AGENT_TASK_FACTORS)
    for path in (aggregator.config.state_dir / "blobs" / "objects").rglob("sum"):
        path.unlink()

    with pytest.raises(UnknownBlob, match="expected stored bytes"):
        await agents[0].download(kind=wire.PAYLOAD_KIND_SENSITIVITY, plan_version=1)


async def test_events_tell_the_story_from_any_point_on(negotiating, agents):
    await send_sensitivities(agents[0], sensitivities())
    stories = [await negotiating.events(after, until="ballot_received") for after in (0, 3)]

    assert [event.sequence for event in stories[0]] == list(range(1, len(stories[0]) + 1))
    assert stories[1] == stories[0][3:]
    assert stories[0][-1].agent == "agent-1"
