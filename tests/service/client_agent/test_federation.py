"""Agents with tiny transformers in a whole federation: what they average, what survives, what they are refused."""

from __future__ import annotations

import asyncio
import contextlib
import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from services.client_agent.adapter import AdapterState
from services.client_agent.connection import Connection, connect
from services.client_agent.domain import Activity, PayloadKind, Registration, Upload
from services.client_agent.state import AgentState, load_tensors
from services.common.channel import open_channel
from services.common.clock import SystemClock
from services.common.identity import Role
from shelora.errors import (
    AgentRevoked,
    FederationEnded,
    InvalidConfiguration,
    InvalidPlan,
    MalformedPayload,
    ModelMismatch,
    RoleDenied,
    SheLoraError,
    UnknownAgent,
    UnknownFederation,
    UnknownRound,
)
from shelora.plan import Packing, cipher_bytes
from shelora.rounds import AgentTask, FederationState, RoundPhase
from support.deployment import Deployment, JumpingClock, until, until_seen
from support.keymanager import FEDERATION
from support.linear_trainer import SHAPES, signature
from support.revealed import verify_round

BOUND = 1e-6
DENSE_BOUND = 1e-5
"""Of updates as small as two steps of training make them."""
NAMES = ("agent-0", "agent-1", "agent-2")
BUDGETS = ("full", "30%", "5 columns")


async def start_all(deployment: Deployment, **changes) -> None:
    for number, (name, budget) in enumerate(zip(NAMES, BUDGETS, strict=True)):
        await deployment.enrol(name)
        await deployment.start_agent(name, number, encryption={"budget": budget, "threads": 1}, **changes)


async def test_two_rounds_with_unequal_ranks_and_budgets(deployment):
    await start_all(deployment)
    await deployment.create()
    await deployment.finish()
    federation = await deployment.operator.get(FEDERATION)
    assert federation.state is FederationState.FINISHED
    rounds = await deployment.operator.rounds(FEDERATION)
    assert [(found.number, found.phase) for found in rounds] == [(1, RoundPhase.PUBLISHED), (2, RoundPhase.PUBLISHED)]
    for found in rounds:
        assert found.counted == NAMES
        verdict = verify_round(deployment.reveals(), found.number)
        assert verdict.counted == verdict.openings == NAMES
        assert verdict.difference <= BOUND
        for member in found.members:
            assert member.metrics["bytes_up"] == member.factors_bytes + member.cipher_bytes
            assert 0 <= member.metrics["accuracy_after"] <= 1
            assert member.metrics["steps"] == 2
    for running in deployment.agents.values():
        status = running.agent.board.status
        assert (status.activity, status.applied_round, status.last_error) == (Activity.ENDED, 2, "")


async def test_an_agent_that_sends_a_larger_rank_than_it_trains(deployment):
    """Two agents, one of rank 2 that sends 8: to the aggregator it has rank 8, its saved adapters have rank 2."""
    for number, (name, lora) in enumerate((("agent-0", {"rank": 2, "sent_rank": 8}), ("agent-1", {"rank": 4}))):
        await deployment.enrol(name)
        await deployment.start_agent(name, number, lora=lora)
    await deployment.create(target_agents=2, basis_cap=12)
    await deployment.finish()
    rounds = await deployment.operator.rounds(FEDERATION)
    assert [found.number for found in rounds] == [1, 2]
    for found in rounds:
        assert {member.agent: member.rank for member in found.members} == {"agent-0": 8, "agent-1": 4}
        verdict = verify_round(deployment.reveals(), found.number)
        assert verdict.counted == verdict.openings == ("agent-0", "agent-1")
        assert verdict.difference <= BOUND
    agent = deployment.agents["agent-0"].agent
    assert (agent.board.status.rank, agent.board.status.sent_rank) == (2, 8)
    async with deployment.agents["agent-0"].control() as control:
        status = await control.status()
    assert (status.rank, status.sent_rank) == (2, 8)
    config = json.loads((agent.state.adapter(2) / "adapter_config.json").read_text())
    assert config["r"] == 2
    state = AdapterState.load(agent.state.adapter_state(2))
    assert {module.rank for module in state.modules} == {2}
    assert all(0 < kept.rank <= 6 for kept in state.residual)
    opened = load_tensors(deployment.reveals()["agent-0"] / "round-002-average.safetensors")
    for index, (module, kept) in enumerate(zip(state.modules, state.residual, strict=True)):
        total = opened[f"{index}.basis"] @ opened[f"{index}.core"]
        left, energy, right = np.linalg.svd(total, full_matrices=False)
        held = 2.0 * module.b @ module.a + kept.left @ kept.right
        np.testing.assert_allclose(held, (left[:, :8] * energy[:8]) @ right[:8], atol=1e-5 * np.abs(total).max())


async def test_a_round_with_dense_packing(deployment):
    """Everything real: the option from operator to agents, ranges in the answers, blocks of the right number."""
    await start_all(deployment)
    await deployment.create(rounds=1, packing=Packing.DENSE)
    await deployment.finish()
    federation = await deployment.operator.get(FEDERATION)
    assert (federation.state, federation.spec.packing) == (FederationState.FINISHED, Packing.DENSE)
    assert federation.plan is not None
    assert federation.plan.packing is Packing.DENSE
    (found,) = await deployment.operator.rounds(FEDERATION)
    layout = federation.plan.layout([member.rank for member in found.members])
    for member in found.members:
        assert member.cipher_bytes == cipher_bytes(layout, member.columns)
    verdict = verify_round(deployment.reveals(), 1)
    assert verdict.counted == verdict.openings == NAMES
    assert verdict.difference <= DENSE_BOUND


async def test_a_federation_too_large_for_dense_packing_is_refused(deployment):
    with pytest.raises(InvalidPlan, match="at most 4096 target agents with dense packing, got 4097"):
        await deployment.create(target_agents=4097, packing=Packing.DENSE)
    with pytest.raises(UnknownFederation):
        await deployment.operator.get(FEDERATION)


async def test_saved_adapters_load_in_peft(deployment):
    await start_all(deployment)
    await deployment.create(rounds=1)
    await deployment.finish()
    agent = deployment.agents["agent-1"].agent
    base = AutoModelForSequenceClassification.from_pretrained(deployment.model, num_labels=2)
    tuned = PeftModel.from_pretrained(base, agent.state.adapter(1))
    with torch.no_grad():
        logits = tuned(torch.tensor([[2, 6, 3]])).logits
    assert np.isfinite(logits.numpy()).all()


async def test_running_rounds_and_restarts_need_no_key_manager(deployment):
    await start_all(deployment)
    await until(lambda: all(one.agent.board.status.name for one in deployment.agents.values()), "everyone is enrolled")

    async def registered() -> bool:
        with contextlib.suppress(UnknownFederation):
            return len(await deployment.operator.agents(FEDERATION)) == 3
        return False

    deployment.agents["agent-0"].agent.pause()
    await deployment.create()
    await until_seen(registered, "everyone is registered")
    await deployment.stop_keymanager()
    await deployment.agents["agent-0"].kill()
    await deployment.start_agent("agent-0", 0)
    await deployment.finish()
    for number in (1, 2):
        verdict = verify_round(deployment.reveals(), number)
        assert verdict.counted == NAMES
        assert verdict.difference <= BOUND
    await deployment.start_keymanager()


async def test_an_enrolled_agent_waits_for_its_first_keys(deployment):
    """Certificate there, epoch never fetched, key manager down: it waits, then goes on."""
    await start_all(deployment)
    first = deployment.agents["agent-0"]
    await until(lambda: first.agent.board.status.name, "agent-0 is enrolled")
    await first.kill()
    await deployment.stop_keymanager()
    await deployment.create()
    await deployment.start_agent("agent-0", 0)
    restarted = deployment.agents["agent-0"].agent
    await until(lambda: restarted.board.status.activity is Activity.RECONNECTING, "agent-0 misses the key manager")
    await deployment.start_keymanager()
    await deployment.finish()
    assert restarted.board.status.applied_round == 2


async def test_a_stopped_federation_ends_its_agents(deployment):
    await start_all(deployment, training={"steps": 1000, "batch_size": 4, "threads": 1, "device": "cpu"})
    await deployment.create()
    training = [one.agent.board for one in deployment.agents.values()]
    await until(lambda: all(board.status.activity is Activity.TRAINING for board in training), "everyone trains")
    await deployment.operator.stop(FEDERATION, "maintenance")
    for running in deployment.agents.values():
        with pytest.raises(FederationEnded, match="stopped: maintenance"):
            await asyncio.wait_for(running.life, 30)


async def test_another_model_is_refused(deployment):
    await start_all(deployment)
    await deployment.create(target_agents=4)
    await until(lambda: all(one.agent.board.status.rounds for one in deployment.agents.values()), "three registered")
    await deployment.enrol("stranger")
    other = {"rank": 2, "target_modules": ["key"]}
    stranger = await deployment.start_agent("stranger", 3, lora=other)
    with pytest.raises(ModelMismatch, match="trained shapes differ"):
        await asyncio.wait_for(stranger.life, 30)


async def test_more_agents_than_the_aggregator_keeps_connected(deployment):
    await deployment.stop_aggregator()
    await deployment.start_aggregator(limits={"connected_agents": 2})
    await start_all(deployment)
    await deployment.create()
    await deployment.finish()
    for number in (1, 2):
        verdict = verify_round(deployment.reveals(), number)
        assert (verdict.counted, verdict.difference <= BOUND) == (NAMES, True)


async def connection_of(deployment: Deployment, name: str, clock=None, **changes) -> Connection:
    await deployment.enrol(name)
    config = deployment.config(name, 0, **changes)
    return await connect(config, AgentState(config.state_dir), clock or SystemClock())


def registration(deployment: Deployment) -> Registration:
    columns = tuple(module.in_features for module in SHAPES.modules)
    return Registration(4, columns, "full", signature(), 1, deployment.parameters.digest(), 10)


async def test_refusals_have_stable_codes(deployment):
    async with await connection_of(deployment, "agent-0") as connection:
        with pytest.raises(UnknownFederation):
            await connection.register(registration(deployment))
        with pytest.raises(UnknownFederation):
            await connection.terms()
        await deployment.create()
        with pytest.raises(UnknownAgent):
            await anext(connection.watch())
        view = await connection.register(registration(deployment))
        assert view.state is FederationState.GATHERING
        with pytest.raises(UnknownRound):
            await connection.report_round(7, {"loss": 0.5})
        with pytest.raises(UnknownRound):
            await connection.leave_round(7, "no such round")
    elsewhere = Connection(
        "elsewhere",
        deployment.aggregator_address,
        deployment.keymanager.address,
        await deployment.keymanager.member(Role.AGENT, "lost"),
        SystemClock(),
    )
    async with elsewhere:
        with pytest.raises(RoleDenied):
            await elsewhere.register(registration(deployment))
    operator = Connection(
        FEDERATION,
        deployment.aggregator_address,
        deployment.keymanager.address,
        await deployment.keymanager.member(Role.OPERATOR, "oskar"),
        SystemClock(),
    )
    async with operator:
        with pytest.raises(RoleDenied):
            await operator.register(registration(deployment))
        with pytest.raises(RoleDenied):
            await operator.fetch_epoch(1, bytes(1216))


async def test_failures_that_are_mended_by_trying_again_are_told(deployment):
    await deployment.enrol("agent-0")
    told: list[SheLoraError] = []
    config = deployment.config("agent-0", 0)
    async with await connect(config, AgentState(config.state_dir), SystemClock(), told.append) as connection:
        await deployment.stop_aggregator()
        reporting = asyncio.ensure_future(connection.report_round(1, {"loss": 0.5}))
        await until(lambda: told, "the aggregator is missed")
        await deployment.start_aggregator()
        with pytest.raises(UnknownFederation):
            await asyncio.wait_for(reporting, 60)
    assert {error.code for error in told} == {"peer_unreachable"}


async def test_a_certificate_for_another_federation_is_noticed(deployment):
    with pytest.raises(InvalidConfiguration, match="is for federation 'clinics', the configuration says 'wards'"):
        await connection_of(deployment, "agent-0", federation="wards")
    # Enrolled by now: without the file the key manager's address is missing, not the identity.
    config = deployment.config("agent-0", 0, enrolment_file=None)
    with pytest.raises(InvalidConfiguration, match="no key manager address"):
        await connect(config, AgentState(config.state_dir), SystemClock())


async def test_a_renewed_certificate_reopens_the_channel_and_cuts_nothing(deployment):
    clock = JumpingClock()
    await deployment.create()
    connection = await connection_of(deployment, "agent-0", clock)
    certificate = deployment.folder / "agent-0" / "identity" / "certificate.pem"
    before = certificate.read_bytes()
    async with connection, contextlib.aclosing(connection.watch()) as views:
        await connection.register(registration(deployment))
        first = await anext(views)
        assert first.state is FederationState.GATHERING
        link = connection._link
        following = asyncio.ensure_future(_until_state(views, FederationState.STOPPED))
        clock.set_offset(86_400 * 2 / 3 + 5)
        await until(lambda: certificate.read_bytes() != before, "the certificate is renewed")
        clock.set_offset(0)
        await until(lambda: connection._link is not link and not link._users, "the old channel is idle")
        assert not following.done()
        assert (await connection.terms()).epoch == 1
        await deployment.operator.stop(FEDERATION, "enough")
        assert (await asyncio.wait_for(following, 30)).reason == "enough"


async def _until_state(views, state):
    async for view in views:
        if view.state is state:
            return view
    raise AssertionError("the stream ended")


async def test_an_agent_whose_renewal_is_refused_ends(deployment):
    clock = JumpingClock()
    await deployment.create()
    await deployment.enrol("agent-0")
    running = await deployment.start_agent("agent-0", 0, clock)
    await until(lambda: running.agent.board.status.rounds, "agent-0 is registered")
    files = await deployment.keymanager.member(Role.OPERATOR, "oskar")
    async with deployment.keymanager.client(files) as client:
        await client.revoke(Role.AGENT, "agent-0", "stolen")
    clock.set_offset(86_400 * 2 / 3 + 5)
    with pytest.raises(AgentRevoked):
        await asyncio.wait_for(running.life, 30)
    assert "revoked" in running.agent.board.status.last_error


async def test_long_payloads_have_a_connection_of_their_own(deployment, monkeypatch, tmp_path):
    """The aggregator holds a connection's receive buffer as long as the connection, about 1 MB after a long upload."""
    opened, closed = [], []

    def opening(address, *arguments):
        channel = open_channel(address, *arguments)
        opened.append(address)

        async def closing():
            closed.append(address)
            await type(channel).close(channel)

        monkeypatch.setattr(channel, "close", closing)
        return channel

    monkeypatch.setattr("services.client_agent.link.open_channel", opening)
    monkeypatch.setattr("services.client_agent.link.LONG_BYTES", 1000)
    await deployment.create(target_agents=2)
    async with contextlib.AsyncExitStack() as stack:
        one, other = [
            await stack.enter_async_context(await connection_of(deployment, name)) for name in ("agent-0", "agent-1")
        ]
        for connection in (one, other):
            await connection.register(registration(deployment))
        view = await anext(one.watch())
        assert view.task is AgentTask.FACTORS
        assert view.plan is not None
        shared = len(opened)
        for size, more in ((999, 0), (1000, 1)):
            payload = tmp_path / f"{size}"
            payload.write_bytes(bytes(size))
            with pytest.raises(MalformedPayload):
                await one.upload(Upload(PayloadKind.FACTORS, payload, 1, view.plan, examples=10), lambda *_: None)
            assert len(opened) - shared == len(closed) == more
        assert opened[-1] == closed[-1] == deployment.aggregator_address
