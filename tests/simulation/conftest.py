from __future__ import annotations

import pytest

from shelora.rounds import effects
from simulation.world import World, make_spec, remove, temporary_folder
from support import postgresql


@pytest.fixture(scope="module", autouse=True)
def folding_at_once():
    """Every ciphertext is folded as it comes, so that three agents make the running sums of a large cohort."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(effects, "FOLD_TERMS", 1)
        yield


@pytest.fixture(scope="module")
def postgresql_url():
    """An empty database on a real PostgreSQL server."""
    folder = postgresql.binaries()
    if folder is None:
        pytest.skip("PostgreSQL is not installed")
    with postgresql.running_server(folder) as url:
        yield url


@pytest.fixture
async def world():
    """An aggregator with a created federation; nobody has registered, nothing is started."""
    folder = temporary_folder()
    async with World(folder, make_spec()) as opened:
        yield opened
    remove(folder)


@pytest.fixture
async def running(world):
    """The same with three registered agents and the first negotiation open."""
    for device in world.devices[:3]:
        await world.register(device)
    await world.service.start_federation(world.spec.federation)
    return world


@pytest.fixture
async def training(running):
    """The same in the first round."""
    for device in running.devices[:3]:
        await running.act(device)
    await running.work()
    return running
