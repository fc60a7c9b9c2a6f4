from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from services.client_agent import codec
from services.client_agent.domain import Activity, Member, PayloadKind, Registration, Status, Terms, Upload
from services.common.codec import plan_to_proto, shapes_from_proto
from services.common.versions import own_version
from shelora.errors import DigestMismatch, VersionMismatch
from shelora.plan import Negotiation, Packing, Plan
from shelora.rounds import AgentTask, FederationState, RoundPhase
from shelora.v1 import agent_pb2, aggregator_pb2, types_pb2
from support.linear_trainer import SHAPES, signature

PLAN = Plan("ward", 2, 3, SHAPES, 16, Negotiation.ENCRYPTED, ((4, 40), (30,)), bytes(range(32)), 4096)


def view_message(**fields) -> aggregator_pb2.AgentView:
    message = aggregator_pb2.AgentView(
        state=aggregator_pb2.FEDERATION_STATE_RUNNING,
        task=aggregator_pb2.AGENT_TASK_CIPHER,
        round=4,
        phase=aggregator_pb2.ROUND_PHASE_CIPHER,
        plan=plan_to_proto(PLAN),
        deadline_ms=99,
        last_published_round=3,
        rounds=9,
        vote_columns=[4, 0],
        reason="because",
        now_ms=77,
    )
    message.MergeFrom(aggregator_pb2.AgentView(**fields))
    return message


def test_a_view_comes_over_whole():
    view = codec.view_from_proto(view_message())
    assert (view.state, view.task, view.phase) == (FederationState.RUNNING, AgentTask.CIPHER, RoundPhase.CIPHER)
    assert (view.round, view.deadline_ms, view.last_published_round, view.rounds) == (4, 99, 3, 9)
    assert (view.vote_columns, view.reason, view.now_ms) == ((4, 0), "because", 77)
    assert view.plan == PLAN
    assert view.assignment == (AgentTask.CIPHER, 4, 2)


def test_a_view_without_round_and_plan():
    message = aggregator_pb2.AgentView(
        state=aggregator_pb2.FEDERATION_STATE_CREATED, task=aggregator_pb2.AGENT_TASK_WAIT
    )
    view = codec.view_from_proto(message)
    assert view.phase is None
    assert view.plan is None
    assert view.assignment == (AgentTask.WAIT, 0, 0)


@pytest.mark.parametrize("fields", [{"task": 99}, {"state": 99}])
def test_words_of_a_later_version_are_refused(fields):
    with pytest.raises(VersionMismatch, match="99"):
        codec.view_from_proto(view_message(**fields))


def test_a_plan_with_another_digest_is_refused():
    message = view_message()
    message.plan.basis_cap = 17
    with pytest.raises(DigestMismatch):
        codec.view_from_proto(message)


@pytest.mark.parametrize(
    ("enum", "wire", "prefix"),
    [
        (AgentTask, aggregator_pb2.AgentTask, "AGENT_TASK_"),
        (FederationState, aggregator_pb2.FederationState, "FEDERATION_STATE_"),
        (RoundPhase, aggregator_pb2.RoundPhase, "ROUND_PHASE_"),
        (PayloadKind, aggregator_pb2.PayloadKind, "PAYLOAD_KIND_"),
        (Activity, agent_pb2.AgentActivity, "AGENT_ACTIVITY_"),
    ],
)
def test_every_word_of_the_wire_has_its_own(enum, wire, prefix):
    assert {f"{prefix}{member.name}" for member in enum} | {f"{prefix}UNSPECIFIED"} == set(wire.keys())


def test_terms_say_everything():
    message = aggregator_pb2.GetTermsResponse(epoch=3, basis_cap=12, packing=aggregator_pb2.PACKING_DENSE)
    assert codec.terms_from_proto(message) == Terms(3, 12, Packing.DENSE)


def test_a_registration_says_everything():
    registration = Registration(4, (40, 3), "10%", signature(), 3, bytes(32), 55)
    message = codec.registration_to_proto("ward", registration)
    assert (message.federation, message.rank, list(message.encrypted_columns)) == ("ward", 4, [40, 3])
    assert (message.budget, message.epoch, message.examples) == ("10%", 3, 55)
    assert message.parameters_digest == bytes(32)
    assert message.version == own_version()
    assert shapes_from_proto(message.signature.shapes) == SHAPES
    assert message.signature.task == "sequence-classification"
    assert len({message.signature.base_model_digest, message.signature.tokenizer_digest}) == 1


def test_an_upload_is_named_by_plan_and_round():
    upload = Upload(PayloadKind.CIPHER, Path("x"), 5, PLAN, b"l" * 32, 7, {"loss": 0.5})
    message = codec.upload_to_proto("ward", upload, types_pb2.PayloadHeader(size_bytes=9, digest=b"s" * 32))
    assert (message.federation, message.round, message.plan_version, message.epoch) == ("ward", 5, 2, 3)
    assert message.kind == aggregator_pb2.PAYLOAD_KIND_CIPHER
    assert (message.payload.size_bytes, message.payload.digest) == (9, b"s" * 32)
    assert message.plan_digest == PLAN.digest()
    assert (message.layout_digest, message.examples, dict(message.metrics)) == (b"l" * 32, 7, {"loss": 0.5})


def test_a_download_header_comes_over_whole():
    member = aggregator_pb2.CohortMember(agent="a", rank=4, counted=True)
    header = aggregator_pb2.DownloadHeader(
        payload=types_pb2.PayloadHeader(size_bytes=11),
        layout_digest=b"d",
        cohort=[member],
        weight=0.25,
        total_weight=0.75,
        plan=plan_to_proto(PLAN),
        first_plain=[3, 2],
    )
    received = codec.received_from_proto(header, Path("p"))
    assert (received.path, received.size_bytes, received.layout_digest) == (Path("p"), 11, b"d")
    assert received.cohort == (Member("a", 4, True),)
    assert received.first_plain == (3, 2)
    assert (received.weight, received.total_weight, received.plan) == (0.25, 0.75, PLAN)


def test_a_status_survives_the_round_trip():
    status = Status(
        name="a",
        federation="ward",
        rank=4,
        budget="full",
        activity=Activity.ENCRYPTING,
        fraction=0.5,
        detail="block 1 of 2",
        round=3,
        rounds=9,
        applied_round=2,
        metrics={"loss": 0.5},
        last_error="oops",
        paused=True,
        sent_rank=16,
    )
    message = codec.status_to_proto(status)
    assert message.version == own_version()
    assert codec.status_from_proto(message, 0.5, "block 1 of 2") == status
    assert codec.status_from_proto(message) == dataclasses.replace(status, fraction=0.0, detail="")
    message.activity = 99  # type: ignore[assignment]
    with pytest.raises(VersionMismatch, match="99"):
        codec.status_from_proto(message)
