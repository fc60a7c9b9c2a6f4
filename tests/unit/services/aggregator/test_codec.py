from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from services.aggregator import codec
from services.aggregator.domain import (
    AgentSummary,
    AgentView,
    Download,
    Event,
    FederationSpec,
    FederationSummary,
    MemberSummary,
    PayloadKind,
    RoundSummary,
    Signature,
    SoftwareVersion,
)
from services.client_agent.codec import view_from_proto
from services.common.blobs import Blob
from services.common.codec import plan_from_proto
from services.operators.codec import rounds_from_proto
from shelora.errors import InvalidIdentifier, MalformedInput, MalformedPayload, SheLoraError
from shelora.plan import Negotiation, Packing
from shelora.rounds import Member
from shelora.rounds.phases import AgentTask, FederationState, RoundPhase
from shelora.v1 import aggregator_pb2 as wire
from support.aggregator import registration
from support.updates import PARAMETERS, SHAPES, make_plan

PLAN = make_plan([(10, 6), (40, 25)])
MEMBER = MemberSummary("agent-1", 4, (10, 6), 30, 0.25, True, True, 100, 200, {"loss": 0.5}, "why")
ROUND = RoundSummary(3, RoundPhase.CIPHER, 1, (MEMBER,), 10, 20, 30, "reason", {"train": 1.5}, 40, 50, 0.75)
SIGNATURE = Signature(SHAPES, b"b" * 32, b"t" * 32, "causal-lm")

specs = st.builds(
    FederationSpec,
    federation=st.just("ward"),
    rounds=st.integers(1, 10_000),
    target_agents=st.integers(2, 100_000),
    quorum=st.integers(2, 100_000),
    epoch=st.integers(1, 2**31),
    parameters=st.just(PARAMETERS),
    negotiation=st.sampled_from(Negotiation),
    renegotiate_every=st.integers(0, 100),
    gather_timeout_s=st.integers(1, 10**6),
    negotiate_timeout_s=st.integers(1, 10**6),
    train_timeout_s=st.integers(1, 10**6),
    cipher_timeout_s=st.integers(1, 10**6),
    basis_cap=st.integers(0, 4096),
    max_abandoned=st.integers(0, 100),
    strategy=st.just("joint"),
    packing=st.sampled_from(Packing),
)


@given(specs, st.sampled_from(FederationState))
def test_specifications_survive_the_wire(spec, state):
    summary = FederationSummary(spec, state, None, 0, None, 7, 8, "why", 9, None)
    message = wire.Federation.FromString(codec.federation_to_proto(summary).SerializeToString())

    assert codec.spec_from_proto(message.spec) == spec
    assert wire.FederationState.Name(message.state) == f"FEDERATION_STATE_{state.name}"
    assert (message.last_published_round, message.agents, message.reason, message.created_at_ms) == (7, 8, "why", 9)
    assert not message.HasField("plan")
    assert not message.HasField("round")


def test_federation_carries_plan_round_and_signature():
    spec = FederationSpec("ward", 3, 3, 2, 1, PARAMETERS)
    message = codec.federation_to_proto(
        FederationSummary(spec, FederationState.RUNNING, PLAN, 5, ROUND, 2, 3, "", 9, SIGNATURE)
    )

    assert plan_from_proto(message.plan) == PLAN
    assert message.plan.negotiated_by == 5
    assert message.signature.base_model_digest == b"b" * 32
    found = message.round
    assert (found.number, found.phase, found.plan_version) == (3, wire.ROUND_PHASE_CIPHER, 1)
    assert (found.deadline_ms, found.started_at_ms, found.ended_at_ms) == (10, 20, 30)
    assert (found.average_bytes, found.cipher_bytes, found.total_weight) == (40, 50, 0.75)
    assert dict(found.phase_seconds) == {"train": 1.5}
    assert (found.member_count, found.complete_count, list(found.members)) == (1, 1, [])


def test_a_round_in_a_list_names_its_members():
    (found,) = codec.round_parts(ROUND)
    (member,) = found.members
    assert (member.agent, member.rank, list(member.encrypted_columns), member.examples) == ("agent-1", 4, [10, 6], 30)
    assert (member.weight, member.cipher_complete, member.counted) == (0.25, True, True)
    assert (member.factors_bytes, member.cipher_bytes, member.left_reason) == (100, 200, "why")
    assert dict(member.metrics) == {"loss": 0.5}


def test_a_round_of_any_size_comes_in_messages_that_fit():
    figures = {f"a figure with quite a long name, {index}": index / 7 for index in range(64)}
    members = tuple(replace(MEMBER, agent=f"agent-{index:04}", metrics=figures) for index in range(3_000))
    parts = [*codec.round_parts(replace(ROUND, members=members)), *codec.round_parts(replace(ROUND, number=4))]
    assert len(parts) > 3
    assert max(part.ByteSize() for part in parts) < 2 << 20
    large, small = rounds_from_proto(parts)
    assert [member.agent for member in large.members] == [member.agent for member in members]
    assert (large.size, large.complete, large.members[-1].metrics) == (3_000, 3_000, figures)
    assert (small.number, small.size, len(small.members)) == (4, 1, 1)
    with pytest.raises(MalformedPayload, match="round 3: expected 3000 members"):
        rounds_from_proto(parts[1:])


@given(st.sampled_from(AgentTask), st.none() | st.sampled_from(RoundPhase), st.sampled_from(FederationState))
def test_agents_read_the_views_that_are_written(task, phase, state):
    view = AgentView(state, task, 4, phase, PLAN, 3, 11, 2, 9, (10, 6), "why", 12)
    message = codec.view_to_proto(view)
    read = view_from_proto(message)

    assert read.task is task
    assert read.round == 4
    assert read.plan == PLAN
    assert (message.phase == wire.ROUND_PHASE_UNSPECIFIED) is (phase is None)
    assert (message.deadline_ms, message.now_ms, message.rounds) == (11, 12, 9)
    assert list(message.vote_columns) == [10, 6]


def test_agents_events_and_downloads():
    agent = AgentSummary("a", 4, (1, 2), "full", SoftwareVersion("0.1.0", 1), 5, True, AgentTask.CIPHER, 6)
    message = codec.agent_to_proto(agent)
    assert (message.name, message.task, message.connected, message.version.package) == ("a", 4, True, "0.1.0")
    assert codec.event_to_proto(Event(1, 2, "k", 3, "a", "d")) == wire.WatchEventsResponse(
        sequence=1, at_ms=2, kind="k", round=3, agent="a", detail="d"
    )
    member = Member("agent-1", 4, (10, 6), 30, uploaded=True, in_cohort=True, counted=True)
    blob = Blob("k", 10, b"s" * 32)
    header = codec.download_to_proto(Download(blob, 0, PLAN, 3, b"l" * 32, (member,), 0.5, 1.0, (10, 6)))
    assert (header.payload.size_bytes, header.payload.digest, header.layout_digest) == (10, b"s" * 32, b"l" * 32)
    assert (header.weight, header.total_weight, header.epoch, header.plan_version) == (0.5, 1.0, 1, 1)
    assert plan_from_proto(header.plan) == PLAN
    assert list(header.cohort) == [wire.CohortMember(agent="agent-1", rank=4, counted=True)]
    assert list(header.first_plain) == [10, 6]


@pytest.mark.parametrize("kind", PayloadKind)
def test_kinds_keep_their_names(kind):
    value = wire.PayloadKind.Value(f"PAYLOAD_KIND_{kind.name}")
    request = wire.DownloadRequest(federation="ward", kind=value, round=2, plan_version=3, offset=4)
    found = codec.download_from_proto(request)
    assert (found.kind, found.round, found.plan_version, found.offset) == (kind, 2, 3, 4)


def test_registrations():
    found = codec.registration_from_proto(registration(4, (10, 6)))
    assert (found.rank, found.columns, found.signature.shapes) == (4, (10, 6), SHAPES)
    assert found.signature == replace(SIGNATURE, base_model_digest=bytes(32), tokenizer_digest=bytes(32),
                                      task="sequence-classification", labels_digest=bytes(32))  # fmt: skip
    cases: list[tuple[dict[str, Any], type[SheLoraError]]] = [
        ({"federation": "Ward"}, InvalidIdentifier),
        ({"budget": "x" * 65}, InvalidIdentifier),
        ({"parameters_digest": b""}, MalformedPayload),
    ]
    for changes, error in cases:
        with pytest.raises(error):
            codec.registration_from_proto(registration(4, (10, 6), **changes))


@given(st.binary(max_size=200))
def test_hostile_messages_are_refused_in_the_trees_own_words(data):
    readers: list[tuple[Any, Any]] = [
        (wire.UploadHeader, codec.ticket_from_proto),
        (wire.RegisterAgentRequest, codec.registration_from_proto),
        (wire.DownloadRequest, codec.download_from_proto),
        (wire.FederationSpec, codec.spec_from_proto),
    ]
    for kind, read in readers:
        with contextlib.suppress(DecodeError, SheLoraError):
            read(kind.FromString(data))


@given(
    st.builds(
        wire.UploadHeader,
        federation=st.sampled_from(["ward", "", "Ward", "a/b"]),
        kind=st.integers(0, 9),
        round=st.integers(0, 2**32 - 1),
        plan_digest=st.binary(max_size=40),
        layout_digest=st.binary(max_size=40),
        examples=st.integers(0, 2**64 - 1),
    )
)
def test_upload_headers_are_never_accepted_without_digests(header):
    with pytest.raises(MalformedInput):
        codec.ticket_from_proto(header)
