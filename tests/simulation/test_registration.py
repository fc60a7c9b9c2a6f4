from __future__ import annotations

from dataclasses import replace

import pytest

from services.aggregator.agents import AgentLimits
from services.aggregator.domain import FederationSpec, Terms
from services.aggregator.payloads import UploadChecks
from services.aggregator.service import AggregatorService, ServiceLimits
from services.common.threads import WorkerPool
from shelora.errors import (
    DigestMismatch,
    FederationExists,
    InvalidIdentifier,
    InvalidPlan,
    MalformedPayload,
    ModelMismatch,
    NonFiniteValue,
    QuotaExceeded,
    RankMismatch,
    SizeMismatch,
    UnknownAgent,
    UnknownFederation,
    UnknownRound,
    ValueOutOfRange,
    WrongEpoch,
    WrongPhase,
)
from shelora.plan import Negotiation, Packing
from shelora.rounds import AgentTask, FederationState
from simulation.devices import FEDERATION, PARAMETERS
from simulation.world import make_spec

NEWER = replace(PARAMETERS, scale_bits=21)


async def test_same_specification_again_answers_the_existing_federation(world):
    first = await world.service.get_federation(FEDERATION)
    assert await world.service.create_federation(world.spec) == first
    assert await world.service.create_federation(replace(world.spec, strategy="")) == first
    with pytest.raises(FederationExists):
        await world.service.create_federation(replace(world.spec, rounds=3))


async def test_specification_survives_start_and_more_rounds(training):
    for _ in range(20):
        for device in training.devices[:3]:
            await training.act(device)
        await training.work()
    finished = await training.service.get_federation(FEDERATION)
    assert finished.state is FederationState.FINISHED
    more = await training.service.start_federation(FEDERATION, 3)
    assert (more.spec.rounds, more.state) == (5, FederationState.RUNNING)
    assert (await training.service.create_federation(training.spec)).spec.rounds == 5


@pytest.mark.parametrize(
    "changes",
    [
        {"rounds": 0},
        {"rounds": 10_001},
        {"quorum": 1},
        {"quorum": 4},
        {"train_timeout_s": 0},
        {"cipher_timeout_s": 2_592_001},
        {"basis_cap": 4_097},
        {"epoch": 0},
        {"max_abandoned": 101},
        {"renegotiate_every": -1},
        {"strategy": "alternating"},
        {"packing": Packing.DENSE, "target_agents": 4_097},
    ],
)
async def test_specification_out_of_bounds_is_refused(world, changes):
    with pytest.raises(InvalidPlan):
        await world.service.create_federation(replace(make_spec(federation="other"), **changes))
    assert [summary.spec.federation for summary in await world.service.list_federations()] == [FEDERATION]


async def test_federation_names_are_checked_and_unknown_ones_named(world):
    with pytest.raises(InvalidIdentifier):
        await world.service.create_federation(make_spec(federation="../etc"))
    for call in (
        world.service.get_federation("none"),
        world.service.start_federation("none"),
        world.service.list_agents("none"),
        world.service.list_rounds("none"),
    ):
        with pytest.raises(UnknownFederation):
            await call


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"epoch": 2}, WrongEpoch),
        ({"parameters_digest": bytes(32)}, DigestMismatch),
        ({"rank": 0}, RankMismatch),
        ({"rank": 8}, RankMismatch),
        ({"columns": (1,)}, SizeMismatch),
        ({"columns": (10, 1)}, ValueOutOfRange),
        ({"examples": 0}, ValueOutOfRange),
        ({"budget": "x" * 65}, ValueOutOfRange),
        ({"federation": "none"}, UnknownFederation),
    ],
)
async def test_registration_that_does_not_fit_is_refused(world, changes, error):
    device = world.devices[0]
    with pytest.raises(error):
        await world.service.register_agent(device.identity, replace(device.registration(), **changes))
    assert (await world.service.get_federation(FEDERATION)).agents == 0


async def test_first_agent_decides_the_model_and_may_change_it_while_it_is_alone(world):
    first, second = world.devices[:2]
    await world.service.register_agent(first.identity, first.registration(base=b"wrong"))
    await world.service.register_agent(first.identity, first.registration())
    with pytest.raises(ModelMismatch, match="base model differ"):
        await world.service.register_agent(second.identity, second.registration(base=b"wrong"))
    await world.register(second)
    with pytest.raises(ModelMismatch):
        await world.service.register_agent(first.identity, first.registration(base=b"wrong"))


async def test_partial_budgets_need_a_negotiation(world):
    await world.service.create_federation(make_spec(federation="plain", negotiation=Negotiation.NONE))
    full, partial = world.devices[:2]
    await world.service.register_agent(full.identity, replace(full.registration(), federation="plain"))
    with pytest.raises(InvalidPlan, match="budget full"):
        await world.service.register_agent(partial.identity, replace(partial.registration(), federation="plain"))


async def test_agents_are_limited(world):
    limits = ServiceLimits(agents=AgentLimits(max_agents=1))
    checks = UploadChecks(WorkerPool(1))
    service = AggregatorService(world.database, world.blobs, checks, world.clock, limits)
    first, second = world.devices[:2]
    await service.register_agent(first.identity, first.registration())
    await service.register_agent(first.identity, first.registration())
    with pytest.raises(QuotaExceeded):
        await service.register_agent(second.identity, second.registration())


async def test_agents_are_listed_with_what_they_do(training):
    training.clock.advance(5)
    device = training.devices[1]
    views = training.service.watch_view(device.identity, FEDERATION)
    await views.__anext__()
    agents = {agent.name: agent for agent in await training.service.list_agents(FEDERATION)}
    await views.aclose()
    listed = agents[device.name]
    assert (listed.rank, listed.columns, listed.examples) == (device.rank, device.columns, device.examples)
    assert (listed.task, listed.connected, listed.budget) == (AgentTask.FACTORS, True, "25%")
    assert listed.last_seen_ms == training.clock.now_ms()
    assert not agents["agent-0"].connected
    assert not (await training.service.list_agents(FEDERATION))[1].connected


async def test_epoch_is_adopted_with_its_parameters(training):
    adopted = await training.service.adopt_epoch(FEDERATION, 2, NEWER)
    assert adopted.spec.epoch == 1
    await training.service.adopt_epoch(FEDERATION, 2, NEWER)
    with pytest.raises(InvalidPlan, match="known by"):
        await training.service.adopt_epoch(FEDERATION, 2, PARAMETERS)
    with pytest.raises(WrongEpoch):
        await training.service.adopt_epoch(FEDERATION, 1, PARAMETERS)
    with pytest.raises(InvalidPlan):
        await training.service.adopt_epoch(FEDERATION, 2**32, PARAMETERS)
    device = training.devices[0]
    newer = replace(device.registration(epoch=2), parameters_digest=NEWER.digest())
    await training.service.register_agent(device.identity, newer)
    await training.wait(100)
    assert await training.service.get_terms(FEDERATION) == Terms(2, training.spec.basis_cap, training.spec.packing)
    moved = await training.service.get_federation(FEDERATION)
    assert (moved.spec.epoch, moved.spec.parameters) == (2, NEWER)
    assert moved.plan is not None
    assert (moved.plan.version, moved.plan.epoch, moved.plan.parameters_digest) == (2, 2, NEWER.digest())
    await training.restart()
    assert (await training.service.get_federation(FEDERATION)).plan == moved.plan


async def test_reports_belong_to_rounds_that_are_over(training):
    device = training.devices[0]
    with pytest.raises(WrongPhase):
        await training.service.report_round(device.identity, FEDERATION, 1, {"accuracy_after": 0.5})
    with pytest.raises(UnknownRound):
        await training.service.report_round(device.identity, FEDERATION, 9, {"accuracy_after": 0.5})
    for _ in range(2):
        for each in training.devices[:3]:
            await training.act(each)
        await training.work()
    for accuracy in (0.5, 0.75):
        await training.service.report_round(device.identity, FEDERATION, 1, {"accuracy_after": accuracy})
    first = (await training.service.list_rounds(FEDERATION))[0]
    figures = {member.agent: member.metrics for member in first.members}
    assert figures[device.name] == {"loss": 0.5, "accuracy_after": 0.75}
    assert figures["agent-1"] == {"loss": 0.5}
    stranger = training.devices[4]
    with pytest.raises(UnknownAgent):
        await training.service.report_round(stranger.identity, FEDERATION, 1, {})


@pytest.mark.parametrize(
    ("metrics", "error"),
    [
        ({f"m{index}": 1.0 for index in range(65)}, MalformedPayload),
        ({"": 1.0}, MalformedPayload),
        ({"x" * 201: 1.0}, MalformedPayload),
        ({"loss": float("nan")}, NonFiniteValue),
        ({"loss": float("inf")}, NonFiniteValue),
    ],
)
async def test_figures_out_of_bounds_are_refused(training, metrics, error):
    with pytest.raises(error):
        await training.service.report_round(training.devices[0].identity, FEDERATION, 1, metrics)


async def test_reasons_are_short(running):
    with pytest.raises(InvalidPlan):
        await running.service.stop_federation(FEDERATION, "x" * 201)
    stopped = await running.service.stop_federation(FEDERATION, "maintenance")
    assert (stopped.state, stopped.reason) == (FederationState.STOPPED, "maintenance")


def test_specification_defaults_are_those_of_the_contract():
    spec = FederationSpec("ward", rounds=1, target_agents=2, quorum=2, epoch=1, parameters=PARAMETERS)
    assert (spec.negotiation, spec.strategy) == (Negotiation.ENCRYPTED, "joint")
