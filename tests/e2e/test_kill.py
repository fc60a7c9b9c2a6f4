"""kill -9 in every phase, agent and aggregator: the federation finishes every round, everyone counts exactly once."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import AsyncIterator, Callable

import pytest
import structlog

from services.client_agent.domain import Activity, Status
from services.operators.client import FederationClient
from services.operators.domain import FederationSpec
from shelora.rounds import FederationState, RoundPhase
from support.processes import FEDERATION, Site
from support.revealed import verify_round

log = structlog.get_logger(__name__)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROUNDS = 9
VICTIM = "agent-0"
STEPS = 60
"""Long enough that a training is still running when its first status arrives."""

AGENT_DEATHS: dict[int, Callable[[Status], bool]] = {
    1: lambda status: status.activity is Activity.TRAINING,
    2: lambda status: (status.activity, status.detail) == (Activity.TRANSFERRING, "factors"),
    3: lambda status: status.activity is Activity.ENCRYPTING or status.detail == "cipher",
    4: lambda status: status.detail == "average of round 3",
}
"""Round to what the agent is doing when it is killed; the last one after round 3 was published."""

AGGREGATOR_DEATHS = {
    5: ("round_opened", 1, {"train", "factors"}),
    6: ("factors_received", 1, {"factors", "basis", "cipher"}),
    7: ("factors_received", 3, {"basis", "cipher"}),
    8: ("basis_computed", 1, {"cipher", "sum"}),
    9: ("cipher_received", 3, {"sum", "published"}),
}
"""Round to the event after which the aggregator is killed, and the phases it can have died in.

The first one is aimed at: TRAIN, FACTORS, BASIS, CIPHER, SUM. A busy machine may kill a little later.
"""


@pytest.fixture(scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    site = Site(tmp_path_factory.mktemp("kill"))
    try:
        await site.prepare(training={"steps": STEPS, "batch_size": 4, "threads": 1, "device": "cpu"})
        yield site
    finally:
        site.close()


def phase_on_disk(site: Site, number: int) -> str:
    """The phase of a round that the dead aggregator had made durable."""
    with contextlib.closing(sqlite3.connect(site.folder / "aggregator" / "aggregator.db")) as database:
        ((phase,),) = database.execute("select phase from rounds where number = ?", (number,)).fetchall()
    return str(phase)


async def begin(site: Site, operator: FederationClient) -> None:
    spec = FederationSpec(FEDERATION, ROUNDS, target_agents=3, quorum=3, epoch=1, parameters=site.parameters)
    await operator.create(spec)
    await operator.start(FEDERATION)
    for name in site.names:
        site.start(name)


async def test_death_in_every_phase_costs_no_round_and_counts_nobody_twice(site):
    site.start("keymanager")
    await site.ready("keymanager")
    site.start("aggregator")
    await site.ready("aggregator")
    async with site.operator() as operator:
        await begin(site, operator)
        for number, doing in AGENT_DEATHS.items():
            await site.status(
                VICTIM, lambda status, number=number, doing=doing: status.round == number and doing(status)
            )
            site.kill(VICTIM)
            if number == 1:
                # Everyone holds a certificate and keys by now: the rest needs no key manager.
                site.kill("keymanager")
                assert not (site.folder / VICTIM / "rounds" / "1" / "factors.safetensors").exists()
            site.start(VICTIM)
        for number, (kind, count, phases) in AGGREGATOR_DEATHS.items():
            await site.event(operator, kind, number, count)
            site.kill("aggregator")
            died_in = phase_on_disk(site, number)
            log.info("the aggregator died", round=number, phase=died_in)
            assert died_in in phases
            site.start("aggregator")
            await site.ready("aggregator")
        assert [await site.exit_code(name) for name in site.names] == [0, 0, 0], site.logs()
        federation = await operator.get(FEDERATION)
        assert federation.state is FederationState.FINISHED
        rounds = await operator.rounds(FEDERATION)
    assert [(found.number, found.phase) for found in rounds] == [
        (number, RoundPhase.PUBLISHED) for number in range(1, ROUNDS + 1)
    ]
    for found in rounds:
        assert found.counted == tuple(site.names)
        assert found.total_weight == pytest.approx(1.0)
        verdict = verify_round(site.reveals(), found.number)
        assert verdict.counted == verdict.openings == tuple(site.names)
        assert verdict.difference <= 1e-6
        assert all("accuracy_after" in member.metrics for member in found.members)
    assert site.starts == {"keymanager": 1, "aggregator": 6, "agent-0": 5, "agent-1": 1, "agent-2": 1}


async def test_a_stopped_federation_ends_the_agent_with_a_clear_message(site):
    async with site.operator() as operator:
        await operator.start(FEDERATION, more_rounds=1)
        site.start(VICTIM)
        await site.status(VICTIM, lambda status: status.activity is Activity.TRAINING)
        await operator.stop(FEDERATION, "maintenance tonight")
        assert await site.exit_code(VICTIM) == 1
    message = site.log(VICTIM).splitlines()[-2:]
    assert message[0] == "federation_ended: the federation was stopped: maintenance tonight"
    assert message[1].strip() == "what to do: ask its operator"
