"""More agents than the aggregator keeps connected."""

from __future__ import annotations

from contextlib import aclosing

import pytest

from services.aggregator.payloads import UploadChecks
from services.aggregator.service import AggregatorService, ServiceLimits
from services.common.threads import WorkerPool
from shelora.errors import Draining
from shelora.rounds import AgentTask
from simulation.devices import FEDERATION


@pytest.fixture
def crowded(training):
    """The aggregator of a running round with two places for three agents."""
    limits = ServiceLimits(connected_agents=2)
    return AggregatorService(training.database, training.blobs, UploadChecks(WorkerPool(1)), training.clock, limits)


async def connected(service):
    return {agent.name: agent.connected for agent in await service.list_agents(FEDERATION)}


async def test_who_finds_no_place_gets_one_view_and_when_to_come_back(training, crowded):
    first, second, third = (device.identity for device in training.devices[:3])
    async with aclosing(crowded.watch_view(first, FEDERATION)) as one:
        async with aclosing(crowded.watch_view(second, FEDERATION)) as two:
            for stream in (one, two):
                assert (await anext(stream)).come_back_ms == 0
            views = [view async for view in crowded.watch_view(third, FEDERATION)]
            assert [view.task for view in views] == [AgentTask.FACTORS]
            assert 500 <= views[0].come_back_ms <= 1500
            assert await connected(crowded) == {first.name: True, second.name: True, third.name: True}
        async with aclosing(crowded.watch_view(third, FEDERATION)) as three:
            assert (await anext(three)).come_back_ms == 0
            late = [view async for view in crowded.watch_view(second, FEDERATION)]
            assert late[0].come_back_ms > 0
        training.clock.advance(60)
        assert await connected(crowded) == {first.name: True, second.name: False, third.name: False}


async def test_nobody_is_told_to_come_back_by_an_aggregator_that_shuts_down(training, crowded):
    first, second, third = (device.identity for device in training.devices[:3])
    async with (
        aclosing(crowded.watch_view(first, FEDERATION)) as one,
        aclosing(crowded.watch_view(second, FEDERATION)) as two,
    ):
        for stream in (one, two):
            await anext(stream)
        await crowded.close()
        with pytest.raises(Draining):
            await anext(crowded.watch_view(third, FEDERATION))
