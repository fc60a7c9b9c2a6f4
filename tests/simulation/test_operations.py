"""Random lists of operations against the real service, SQLite, blobs and computations, on a fake clock.

Everything may happen in any order: uploads, the same again, others in their place, lost connections and responses,
garbage, deadlines, agents that leave or come late, restarts, and deaths of the process at any line.
"""

from __future__ import annotations

from collections.abc import Sequence

import anyio
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shelora.errors import InternalFault, SheLoraError
from shelora.plan import Negotiation
from simulation.devices import FEDERATION
from simulation.world import World, make_spec, remove, temporary_folder

Operation = tuple[str, int]

OPERATIONS = {
    "act": 8,
    "everybody": 4,
    "work": 6,
    "cut": 2,
    "lose": 1,
    "resend": 2,
    "forge": 1,
    "garbage": 1,
    "leave": 1,
    "wait": 2,
    "register": 2,
    "start": 1,
    "stop": 1,
    "restart": 1,
    "die": 4,
}

operations = st.lists(
    st.tuples(
        st.sampled_from([name for name, weight in OPERATIONS.items() for _ in range(weight)]), st.integers(0, 59)
    ),
    max_size=40,
)


async def perform(world: World, operation: Operation) -> None:
    name, number = operation
    device = world.devices[number % len(world.devices)]
    if name == "act":
        await world.act(device)
    elif name == "everybody":
        for each in world.devices:
            await attempt(world, world.act(each))
    elif name == "work":
        await world.work()
    elif name == "cut":
        await world.cut(device)
    elif name == "lose":
        await world.lose_response(device)
    elif name == "resend":
        await world.resend(device)
    elif name == "forge":
        await world.forge(device)
    elif name == "garbage":
        await world.send_garbage(device)
    elif name == "leave":
        await world.leave(device)
    elif name == "wait":
        await world.wait(2.0 * number)
    elif name == "register":
        await world.register(device)
    elif name == "start":
        await world.service.start_federation(FEDERATION)
    elif name == "stop":
        if number > 50:
            await world.service.stop_federation(FEDERATION, "pause")
    elif name == "restart":
        await world.restart()
    else:
        world.fate.die_in(1 + number)


async def attempt(world: World, operation) -> None:
    """Run an operation that may be refused, because agents lose races, and may be the process's last one."""

    async def refusable() -> None:
        try:
            await operation
        except InternalFault:
            raise
        except SheLoraError:
            return

    await world.survive(refusable())


async def simulate(spec, taken: Sequence[Operation], registered: int, url: str | None = None) -> World:
    folder = temporary_folder()
    try:
        async with World(folder, spec, url=url) as world:
            for device in world.devices[:registered]:
                await world.register(device)
            await world.service.start_federation(FEDERATION)
            for operation in taken:
                await attempt(world, perform(world, operation))
                await world.survive(world.check())
            await world.finish()
            return world
    finally:
        remove(folder)


SMOOTH = [("everybody", 0), ("work", 0)] * 6


@settings(max_examples=settings().max_examples // 2)
@given(operations, st.sampled_from(Negotiation), st.integers(0, 5), st.integers(0, 2))
@example(SMOOTH, Negotiation.OPE, 5, 1)
@example([("lose", 2), ("cut", 2)], Negotiation.ENCRYPTED, 3, 0)
def test_whatever_happens_nothing_is_lost_and_nothing_counts_twice(taken, negotiation, registered, renegotiate_every):
    none = negotiation is Negotiation.NONE
    # Without negotiation partial budgets are refused, so such a federation runs with the two agents that encrypt all.
    spec = make_spec(negotiation=negotiation, renegotiate_every=renegotiate_every, target_agents=2 if none else 3)
    anyio.run(simulate, spec, taken, 0 if none else registered)


@pytest.mark.parametrize("negotiation", [Negotiation.ENCRYPTED, Negotiation.OPE])
def test_undisturbed_federation_publishes_every_round(negotiation):
    world = anyio.run(simulate, make_spec(negotiation=negotiation), SMOOTH, 3)
    assert (world.deaths, world.verified) == (0, {1, 2})


@pytest.mark.parametrize("backend", ["sqlite", "postgresql"])
def test_process_that_dies_again_and_again_still_publishes_every_round(backend, request):
    url = request.getfixturevalue("postgresql_url") if backend == "postgresql" else None
    lines = [0, 1, 2, 3, 5, 8] * 6
    deadly = [step for line in lines for step in (("die", line), ("everybody", 0), ("die", line), ("work", 0))]
    world = anyio.run(simulate, make_spec(rounds=4), deadly, 3, url)
    assert world.deaths >= 20
    assert world.verified == {1, 2, 3, 4}


async def _count_lines() -> int:
    folder = temporary_folder()
    try:
        async with World(folder, make_spec(rounds=1)) as world:
            return await _one_round(world)
    finally:
        remove(folder)


async def _one_round(world: World) -> int:
    for device in world.devices[:3]:
        await world.survive(world.register(device))
    begin = world.fate.steps
    await world.survive(world.service.start_federation(FEDERATION))
    for operation in SMOOTH:
        await attempt(world, perform(world, operation))
    return world.fate.steps - begin


async def _die_at(line: int) -> World:
    folder = temporary_folder()
    try:
        async with World(folder, make_spec(rounds=1)) as world:
            world.fate.die_in(line)
            await _one_round(world)
            await world.finish()
            return world
    finally:
        remove(folder)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_death_at_every_single_line_of_a_round():
    lines = anyio.run(_count_lines)
    assert lines > 40
    for line in range(1, lines + 1):
        world = anyio.run(_die_at, line)
        assert world.deaths == 1, line
        assert world.verified == {1}, line
