"""Everything wrong that an agent can send gets its stable code and text, and the round goes on."""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from services.common.channel import send_stream
from services.common.codec import plan_from_proto, shapes_to_proto
from services.common.identity import Role
from services.common.transfer import payload_header
from services.common.versions import PROTOCOL
from shelora import errors
from shelora.plan import ModelShapes, ModuleShape
from shelora.v1 import aggregator_pb2 as wire
from shelora.v1 import types_pb2
from support.aggregator import FEDERATION, Member, upload_header
from support.rounds import BUDGETS, cipher_upload, open_published, send_cipher, send_factors, send_sensitivities
from support.updates import PARAMETERS, sensitivities


@dataclass(frozen=True)
class Case:
    """A wrong upload: a changed header (or payload), and the answer it has to get."""

    error: type[errors.SheLoraError]
    text: str
    header: Callable[[wire.UploadHeader], None] = lambda header: None
    payload: Callable[[bytes], bytes] = lambda payload: payload


def setting(**fields: Any) -> Callable[[wire.UploadHeader], None]:
    def change(header: wire.UploadHeader) -> None:
        header.MergeFrom(wire.UploadHeader(**fields))

    return change


def payload_setting(**fields: Any) -> Callable[[wire.UploadHeader], None]:
    return setting(payload=types_pb2.PayloadHeader(**fields))


def metric(value: float) -> Callable[[wire.UploadHeader], None]:
    def change(header: wire.UploadHeader) -> None:
        header.metrics["loss"] = value

    return change


def tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[bytes], bytes]:
    def edit(payload: bytes) -> bytes:
        found = {name: values.copy() for name, values in safetensors.numpy.load(payload).items()}
        change(found)
        return safetensors.numpy.save(found)

    return edit


def put(name: str, value: object) -> Callable[[bytes], bytes]:
    return tensors(lambda found: found.update({name: np.asarray(value)}))


def residue(value: int) -> Callable[[bytes], bytes]:
    def edit(payload: bytes) -> bytes:
        return payload[:8] + value.to_bytes(8, "little") + payload[16:]

    return edit


HEADERS = [
    Case(errors.WrongEpoch, "expected a payload for key epoch 1, got 2", setting(epoch=2)),
    Case(errors.StalePlan, "expected a payload for plan version 1, got 9", setting(plan_version=9)),
    Case(errors.DigestMismatch, "digest of plan version 1", setting(plan_digest=b"x" * 32)),
    Case(errors.MalformedPayload, "plan_digest: expected 32 bytes, got 31", setting(plan_digest=b"x" * 31)),
    Case(errors.MalformedPayload, "expected a kind that agents upload", setting(kind=wire.PAYLOAD_KIND_AVERAGE)),
    Case(errors.MalformedPayload, "payload kind: expected 1 to 6, got 77", setting(kind=77)),
    Case(errors.MalformedPayload, "digest: expected 32 bytes, got 4", payload_setting(digest=b"abcd")),
    Case(errors.ChecksumMismatch, "expected digest", payload_setting(digest=b"x" * 32)),
    Case(errors.PayloadTooLarge, "expected at most 1099511627776 bytes", payload_setting(size_bytes=2**50)),
    Case(errors.PayloadTooLarge, "bytes", payload_setting(size_bytes=2**39)),
    Case(errors.NonFiniteValue, "loss", metric(float("nan"))),
    Case(errors.RoleDenied, "expected elsewhere, got ward", setting(federation="elsewhere")),
]
FACTORS = [
    *HEADERS,
    Case(errors.UnknownRound, "7", setting(round=7)),
    Case(
        errors.WrongPhase,
        "expected a phase that takes cipher",
        setting(kind=wire.PAYLOAD_KIND_CIPHER, layout_digest=b"x" * 32),
    ),
    Case(errors.ValueOutOfRange, "training examples, got 10000000000000", setting(examples=10**13)),
    Case(errors.SizeMismatch, "by its header", payload=lambda payload: payload[:-4]),
    Case(errors.SizeMismatch, "by its header", payload=lambda payload: payload + b"more"),
    Case(errors.MalformedPayload, "expected a header of 2 to", payload=lambda _: b"\xff" * 600),
    Case(errors.MalformedPayload, "JSON header", payload=lambda payload: payload[:8] + b"]" + payload[9:]),
    Case(errors.MalformedPayload, "0.left: expected dtype F32, got F64", payload=put("0.left", np.zeros((24, 2)))),
    Case(errors.MalformedPayload, "not in the plan 'extra'", payload=put("extra", np.zeros(3, np.float32))),
    Case(errors.MalformedPayload, "missing '1.right'", payload=tensors(lambda found: found.pop("1.right"))),
    Case(
        errors.RankMismatch,
        "0.left: expected shape [24, 2], got [24, 3]",
        payload=put("0.left", np.zeros((24, 3), np.float32)),
    ),
    Case(
        errors.ShapeMismatch,
        "1.right: expected shape [2, 19], got [2, 25]",
        payload=put("1.right", np.zeros((2, 25), np.float32)),
    ),
    Case(
        errors.NonFiniteValue,
        "0.left: expected finite values",
        payload=put("0.left", np.full((24, 2), np.nan, np.float32)),
    ),
    Case(
        errors.ValueOutOfRange,
        "1.left: expected values of at most",
        payload=put("1.left", np.full((16, 2), 1e30, np.float32)),
    ),
    Case(
        errors.ValueOutOfRange,
        "0.right: expected rows of a length of at most 1.001",
        payload=put("0.right", np.full((2, 30), 0.5, np.float32)),
    ),
]
CIPHERS = [
    *HEADERS,
    Case(errors.UnknownRound, "7", setting(round=7)),
    Case(errors.DigestMismatch, "slot layout", setting(layout_digest=b"x" * 32)),
    Case(errors.ConflictingResend, "accepted first", setting(kind=wire.PAYLOAD_KIND_FACTORS, examples=5)),
    Case(errors.SizeMismatch, "expected 1 blocks of 32768 bytes", payload=lambda payload: payload[:-1]),
    Case(errors.SizeMismatch, "got 0", payload=lambda _: b""),
    Case(errors.ResidueOutOfRange, "position 1: expected a residue below", payload=residue(PARAMETERS.modulus)),
    Case(errors.ResidueOutOfRange, "position 1", payload=residue(2**64 - 1)),
]
SENSITIVITIES = [
    *HEADERS,
    Case(errors.MalformedPayload, "round 0", setting(round=3)),
    Case(errors.WrongPhase, "expected sensitivity for this negotiation", setting(kind=wire.PAYLOAD_KIND_VOTES)),
    Case(errors.SizeMismatch, "expected 1 blocks", payload=lambda payload: payload[:-8]),
    Case(errors.ResidueOutOfRange, "", payload=residue(PARAMETERS.modulus)),
]
VOTES = [
    Case(errors.WrongPhase, "expected votes for this negotiation", setting(kind=wire.PAYLOAD_KIND_SENSITIVITY)),
    Case(errors.ValueOutOfRange, "expected numbers from 0 to 39, got 0 to 40", payload=put("0.token", [*range(9), 40])),
    Case(errors.MalformedPayload, "different tokens", payload=put("0.token", [*range(9), 8])),
    Case(errors.ValueOutOfRange, "0.score", payload=put("0.score", [*range(9), 2**40])),
    Case(errors.ShapeMismatch, "expected shape [10], got [9]", payload=put("0.token", range(9))),
]


async def assert_refused(agent: Member, good: wire.UploadHeader, payload: bytes, cases: list[Case]) -> None:
    for case in cases:
        changed = case.payload(payload)
        header = wire.UploadHeader()
        header.CopyFrom(good)
        header.payload.CopyFrom(payload_header(changed))
        case.header(header)
        with pytest.raises(errors.SheLoraError) as caught:
            await agent.upload(header, changed)
        assert type(caught.value) is case.error, f"{case}: {caught.value!r}"
        assert case.text in caught.value.message, f"{case}: {caught.value.message}"
        if case.error not in {errors.RoleDenied}:
            assert not (await agent.staged(good)).complete


async def finish_round(agents: list[Member], contributions, number: int, absent: str = "") -> None:
    for agent in agents:
        if agent.name != absent:
            await send_cipher(agent, contributions[agent.name], number)
    await agents[-1].until(wire.AGENT_TASK_FACTORS, round_number=number + 1)


async def test_bad_sensitivities(negotiating, agents):
    payload = sensitivities(5)
    view = await agents[0].until(wire.AGENT_TASK_NEGOTIATE)
    await assert_refused(agents[0], upload_header(view, wire.PAYLOAD_KIND_SENSITIVITY, payload), payload, SENSITIVITIES)

    for agent in agents:
        await send_sensitivities(agent, payload)
    view = await agents[0].until(wire.AGENT_TASK_FACTORS)
    assert view.plan.negotiated_by == 3
    late = upload_header(view, wire.PAYLOAD_KIND_SENSITIVITY, sensitivities(6))
    with pytest.raises((errors.WrongPhase, errors.ConflictingResend)):
        await agents[0].upload(late, sensitivities(6))


async def test_bad_factors(negotiating, agents, contributions):
    for agent in agents:
        await send_sensitivities(agent, sensitivities())
    view = await agents[0].until(wire.AGENT_TASK_FACTORS)
    contribution = contributions[agents[0].name]
    payload = contribution.factors(plan_from_proto(view.plan))
    header = upload_header(view, wire.PAYLOAD_KIND_FACTORS, payload, examples=contribution.examples)
    await assert_refused(agents[0], header, payload, FACTORS)

    await agents[0].leave(1, "gives up")
    for agent in agents[1:]:
        await send_factors(agent, contributions[agent.name], 1)
    await finish_round(agents, contributions, 1, absent=agents[0].name)

    published = (await negotiating.federation()).last_published_round
    header, _ = await agents[0].download(kind=wire.PAYLOAD_KIND_AVERAGE, round=published)
    assert [(member.agent, member.counted) for member in header.cohort] == [("agent-2", True), ("agent-3", True)]
    assert header.total_weight == pytest.approx(1.0)


async def test_bad_ciphertexts(negotiating, agents, contributions):
    for agent in agents:
        await send_sensitivities(agent, sensitivities())
    for agent in agents:
        await send_factors(agent, contributions[agent.name], 1)
    header, payload, _ = await cipher_upload(agents[0], contributions[agents[0].name], 1)
    await assert_refused(agents[0], header, payload, CIPHERS)

    await agents[0].leave(1, "gives up")
    with pytest.raises(errors.NotInCohort):
        await agents[0].upload(header, payload)
    await finish_round(agents, contributions, 1, absent=agents[0].name)

    header, average = await agents[0].download(kind=wire.PAYLOAD_KIND_AVERAGE, round=1)
    _, cipher = await agents[0].download(kind=wire.PAYLOAD_KIND_CIPHER, round=1)
    counted = [contributions[member.agent] for member in header.cohort if member.counted]
    assert [member.agent for member in counted] == ["agent-2", "agent-3"]
    opened = open_published(header, average, cipher, 1)
    dense = sum(member.examples * member.update.dense[0] for member in counted)
    np.testing.assert_allclose(opened.dense[0], dense / sum(member.examples for member in counted), atol=1e-9)


async def test_bad_votes(operator, agents):
    await operator.create(negotiation=wire.NEGOTIATION_OPE)
    for agent in agents:
        await agent.register(*BUDGETS[agent.name])
    await operator.start()
    view = await agents[0].until(wire.AGENT_TASK_NEGOTIATE)
    counts = list(view.vote_columns)
    good = {}
    for index, count in enumerate(counts):
        good[f"{index}.token"] = np.arange(count)
        good[f"{index}.score"] = np.arange(count)
    payload = safetensors.numpy.save(good)
    assert counts == [10, 6]
    await assert_refused(agents[0], upload_header(view, wire.PAYLOAD_KIND_VOTES, payload), payload, VOTES)

    for agent in agents:
        await agent.upload(upload_header(view, wire.PAYLOAD_KIND_VOTES, payload), payload)
    await agents[0].until(wire.AGENT_TASK_FACTORS)
    _, ranking = await agents[0].download(kind=wire.PAYLOAD_KIND_VOTES, plan_version=1)
    assert safetensors.numpy.load(ranking)["0.token"].tolist() == list(range(9, -1, -1))


async def test_bad_streams(negotiating, agents):
    payload = sensitivities(5)
    view = await agents[0].until(wire.AGENT_TASK_NEGOTIATE)
    header = wire.UploadRequest(header=upload_header(view, wire.PAYLOAD_KIND_SENSITIVITY, payload))
    chunk = types_pb2.Chunk(data=payload, crc32=zlib.crc32(payload))
    cut = types_pb2.Chunk(offset=0, data=payload[:100], crc32=0)
    first = types_pb2.Chunk(data=payload[:100], crc32=zlib.crc32(payload[:100]))
    gap = types_pb2.Chunk(offset=200, data=b"x", crc32=first.crc32)
    cases = [
        ([], errors.MalformedPayload, "expected a header first"),
        ([wire.UploadRequest(chunk=chunk)], errors.MalformedPayload, "expected a header first"),
        ([wire.UploadRequest()], errors.MalformedPayload, "expected a header first"),
        ([header, header], errors.MalformedPayload, "expected chunks after the header"),
        ([header, wire.UploadRequest()], errors.MalformedPayload, "expected chunks after the header"),
        ([header, wire.UploadRequest(chunk=types_pb2.Chunk())], errors.MalformedPayload, "got none"),
        ([header, wire.UploadRequest(chunk=cut)], errors.ChecksumMismatch, "CRC-32"),
        ([header, wire.UploadRequest(chunk=gap)], errors.ChecksumMismatch, "CRC-32"),
        ([header, wire.UploadRequest(chunk=types_pb2.Chunk(data=b"x" * (5 << 20)))], errors.PayloadTooLarge, "larger"),
        ([header], errors.SizeMismatch, "got 0 so far"),
        ([header, wire.UploadRequest(chunk=first)], errors.SizeMismatch, "got 100 so far"),
        ([header, wire.UploadRequest(chunk=first)], errors.OffsetMismatch, "offset 100, got offset 0"),
    ]
    for messages, error, text in cases:

        async def requests(sent: list[wire.UploadRequest] = messages) -> AsyncIterator[wire.UploadRequest]:
            for message in sent:
                yield message

        with pytest.raises(error, match=text):
            await send_stream(agents[0].rounds.Upload, requests(), timeout_s=20)

    assert (await agents[0].staged(header.header)).staged_bytes == 100
    await agents[0].upload(header.header, payload, offset=100)


async def test_agents_that_do_not_belong_together(aggregator, operator, agents):
    await operator.create()
    await agents[0].register(2, (10, 6))
    other = ModelShapes((ModuleShape("encoder.query", 24, 40),), ())
    signature = types_pb2.ModelSignature(
        shapes=shapes_to_proto(other), base_model_digest=bytes(32), tokenizer_digest=bytes(32), task="causal-lm"
    )
    short = types_pb2.ModelSignature(shapes=shapes_to_proto(other), base_model_digest=b"short")
    cases: list[tuple[dict[str, Any], type[errors.SheLoraError], str]] = [
        (
            {"version": types_pb2.SoftwareVersion(package="9.9.9", protocol=PROTOCOL + 1)},
            errors.VersionMismatch,
            "package 9.9.9",
        ),
        ({"epoch": 2}, errors.WrongEpoch, "expected key epoch 1, got 2"),
        ({"parameters_digest": b"x" * 32}, errors.DigestMismatch, "CKKS parameters of epoch 1"),
        ({"parameters_digest": b"x"}, errors.MalformedPayload, "parameters_digest: expected 32 bytes, got 1"),
        ({"signature": signature, "encrypted_columns": (10,)}, errors.ModelMismatch, "trained shapes, task, labels"),
        ({"signature": short}, errors.MalformedPayload, "base_model_digest"),
        ({"rank": 0}, errors.RankMismatch, "got 0"),
        ({"rank": 17}, errors.RankMismatch, "expected a rank of 1 to 16, got 17"),
        ({"encrypted_columns": (41, 6)}, errors.ValueOutOfRange, "'encoder.query', got 41"),
        ({"encrypted_columns": (10,)}, errors.SizeMismatch, "2 modules, got 1"),
        ({"examples": 0}, errors.ValueOutOfRange, "training examples, got 0"),
        ({"budget": "x" * 65}, errors.InvalidIdentifier, "budget: expected at most 64"),
        ({"budget": "a\nb"}, errors.InvalidIdentifier, "printable"),
        ({"federation": "elsewhere"}, errors.RoleDenied, "expected elsewhere, got ward"),
    ]
    for changes, error, text in cases:
        fields = {"rank": 2, "columns": (10, 6), **changes}
        rank, columns = fields.pop("rank"), fields.pop("encrypted_columns", fields.pop("columns"))
        with pytest.raises(error, match=text):
            await agents[1].register(rank, columns, **fields)

    with pytest.raises(errors.UnknownAgent):
        await agents[1].until(wire.AGENT_TASK_NEGOTIATE)
    async with aggregator.member(Role.AGENT, "visitor", federation="elsewhere") as visitor:
        with pytest.raises(errors.RoleDenied, match=f"expected {FEDERATION}, got elsewhere"):
            await visitor.register(2, (10, 6))


async def test_bad_specifications(operator):
    cases: list[tuple[dict[str, Any], type[errors.SheLoraError], str]] = [
        ({"quorum": 1}, errors.InvalidPlan, "quorum from 2"),
        ({"quorum": 4}, errors.InvalidPlan, "quorum of at most target_agents"),
        ({"rounds": 0}, errors.InvalidPlan, "rounds"),
        ({"negotiation": 9}, errors.InvalidPlan, "negotiation"),
        ({"packing": 9}, errors.InvalidPlan, "packing: expected 1 to 2, got 9"),
        ({"strategy": "magic"}, errors.InvalidPlan, "magic"),
        ({"federation": "elsewhere"}, errors.RoleDenied, "elsewhere"),
        (
            {"parameters": types_pb2.HeParameters(ring_dimension=3)},
            errors.InvalidConfiguration,
            "security_bits: expected 128",
        ),
    ]
    for changes, error, text in cases:
        with pytest.raises(error, match=text):
            await operator.create(**changes)
    with pytest.raises(errors.UnknownFederation):
        await operator.federation()

    await operator.create()
    assert (await operator.create()).spec.rounds == 2
    with pytest.raises(errors.FederationExists):
        await operator.create(rounds=3)


async def test_late_agents_wait_for_the_next_round(aggregator, negotiating, agents, contributions):
    for agent in agents:
        await send_sensitivities(agent, sensitivities())
    for agent in agents:
        await send_factors(agent, contributions[agent.name], 1)
    header, payload, _ = await cipher_upload(agents[0], contributions[agents[0].name], 1)
    async with aggregator.member(Role.AGENT, "latecomer") as late:
        view = await late.register(2, (10, 6))
        assert view.task == wire.AGENT_TASK_WAIT
        with pytest.raises(errors.NotInCohort):
            await late.download(kind=wire.PAYLOAD_KIND_PROJECTION, round=1)
        with pytest.raises(errors.NotInCohort):
            await late.upload(header, payload)
        await finish_round(agents, contributions, 1)
        await late.until(wire.AGENT_TASK_FACTORS, round_number=2)
        contribution = replace(contributions["agent-1"], agent="latecomer")
        await send_factors(late, contribution, 2)
