from __future__ import annotations

import contextlib

import numpy as np
import pytest

from services.common.identity import Role
from shelora.v1 import aggregator_pb2 as wire
from support.aggregator import running_aggregator
from support.rounds import BUDGETS
from support.updates import Contribution


@pytest.fixture
async def aggregator(tmp_path):
    async with running_aggregator(tmp_path) as running:
        yield running


@pytest.fixture
async def operator(aggregator):
    async with aggregator.member(Role.OPERATOR, "olga") as member:
        yield member


@pytest.fixture
async def agents(aggregator):
    """Three agents by name, not registered yet."""
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(aggregator.member(Role.AGENT, name)) for name in BUDGETS]


@pytest.fixture
def contributions():
    """What each agent contributes to every round."""
    rng = np.random.default_rng(4)
    return {
        name: Contribution.random(rng, name, rank, columns, 100 * rank) for name, (rank, columns) in BUDGETS.items()
    }


@pytest.fixture
async def negotiating(operator, agents):
    """A started federation whose three agents are asked for sensitivities."""
    await operator.create()
    for agent in agents:
        await agent.register(*BUDGETS[agent.name])
    await operator.start()
    for agent in agents:
        await agent.until(wire.AGENT_TASK_NEGOTIATE)
    return operator
