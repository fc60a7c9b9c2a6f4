"""The driver with its loops running, and what it does when computations fail."""

from __future__ import annotations

import asyncio

import anyio
import pytest

from services.aggregator.domain import PayloadKind
from services.aggregator.driver import Driver, DriverOptions
from services.aggregator.events import Hub
from shelora.errors import Draining, StorageFull, UnknownAgent, UnknownRound
from shelora.rounds import AgentTask, ComputeBasis, FederationState, RoundPhase
from simulation.devices import FEDERATION
from simulation.world import TRAIN_S, World, make_spec, remove, temporary_folder


async def eventually(condition) -> None:
    """Let other tasks run until something holds; threads and the database take real time."""
    with anyio.fail_after(30):
        while not await condition():
            await anyio.lowlevel.checkpoint()


async def state_of(world):
    return (await world.service.ledger.read(FEDERATION)).state


async def everybody_acts(world) -> None:
    for device in world.devices[:3]:
        await world.act(device)


async def test_running_driver_carries_a_federation_to_its_end(running):
    async def task(device) -> AgentTask:
        return (await running.view(device)).task

    async with anyio.create_task_group() as group:
        group.start_soon(running.driver.run)
        for wanted in [AgentTask.NEGOTIATE, *[AgentTask.FACTORS, AgentTask.CIPHER] * 2]:
            for device in running.devices[:3]:

                async def asked(device=device, wanted=wanted) -> bool:
                    return await task(device) is wanted

                await eventually(asked)
                await running.act(device)

        async def finished() -> bool:
            return (await state_of(running)).state is FederationState.FINISHED

        await eventually(finished)
        group.cancel_scope.cancel()
    await running.check()
    assert running.verified == {1, 2}


async def test_running_driver_applies_deadlines_and_serves_federations_created_later(world):
    async with anyio.create_task_group() as group:
        group.start_soon(world.driver.run)
        await world.service.create_federation(make_spec(federation="late", gather_timeout_s=10))
        await world.service.start_federation("late")

        async def extended() -> bool:
            world.clock.advance(10)
            events = world.service.watch_events("late")
            async for event in events:
                if event.kind == "gathering_extended":
                    await events.aclose()
                    return True
                if event.sequence == (await world.service.ledger.read("late")).next_sequence - 1:
                    break
            await events.aclose()
            return False

        await eventually(extended)
        group.cancel_scope.cancel()


async def test_deadline_waits_are_taken_in_pieces(training):
    assert await training.driver.tick(FEDERATION) == 60.0
    training.clock.advance(TRAIN_S - 1)
    assert await training.driver.tick(FEDERATION) == pytest.approx(1.0)
    training.clock.advance(1)
    assert await training.driver.tick(FEDERATION) == 0.0
    assert (await state_of(training)).abandoned_in_a_row == 1
    await training.service.stop_federation(FEDERATION, "enough")
    assert await training.driver.tick(FEDERATION) is None


async def test_rotten_upload_abandons_the_round_with_the_reason(training):
    await everybody_acts(training)
    key = training.blobs.keys(f"{FEDERATION}/r000001/factors")[1]
    data = bytearray(training.blobs.path(key).read_bytes())
    data[-1] ^= 1
    training.blobs.path(key).write_bytes(data)
    assert await training.driver.advance(FEDERATION) == 1.0
    assert await training.driver.advance(FEDERATION) == 2.0
    await training.work()
    first = (await training.service.list_rounds(FEDERATION))[0]
    assert first.phase is RoundPhase.ABANDONED
    assert first.reason.startswith("stored_bytes_corrupt")
    assert (await state_of(training)).live_round.number == 2
    assert not training.blobs.keys(f"{FEDERATION}/r000001/")


class Failing:
    """The real computations behind a fault that can be repaired."""

    def __init__(self, compute, error: Exception) -> None:
        self._compute = compute
        self.error: Exception | None = error

    def __getattr__(self, name):
        async def call(*args):
            if self.error is not None:
                raise self.error
            return await getattr(self._compute, name)(*args)

        return call


def with_fault(world, error: Exception) -> tuple[Driver, Failing]:
    failing = Failing(world.driver._works._compute, error)
    service = world.service
    return Driver(service.ledger, service.hub, world.blobs, failing, world.clock), failing


async def test_full_disk_is_waited_for_and_the_round_goes_on(training):
    await everybody_acts(training)
    driver, failing = with_fault(training, StorageFull("no space"))
    pauses = [await driver.advance(FEDERATION) for _ in range(8)]
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    assert (await state_of(training)).round.phase is RoundPhase.BASIS
    failing.error = None
    assert await driver.advance(FEDERATION) == 0.0
    assert (await state_of(training)).round.phase is RoundPhase.CIPHER


async def test_defect_in_a_computation_costs_one_round_and_tells_no_details(training):
    await everybody_acts(training)
    driver, _ = with_fault(training, RuntimeError("secret value 42"))
    for _ in range(3):
        await driver.advance(FEDERATION)
    first = (await training.service.list_rounds(FEDERATION))[0]
    assert first.phase is RoundPhase.ABANDONED
    assert "internal_fault" in first.reason
    assert "42" not in first.reason


async def test_loop_survives_what_it_does_not_expect(training):
    await everybody_acts(training)
    calls = []

    async def act(name: str) -> float | None:
        calls.append(name)
        if len(calls) == 1:
            raise OSError("database gone")
        return 5.0 if len(calls) == 2 else None

    async with anyio.create_task_group() as group:
        group.start_soon(training.driver._repeat, FEDERATION, act)

        async def called(times: int) -> bool:
            training.clock.advance(1)
            return len(calls) >= times

        await eventually(lambda: called(3))
        training.service.hub.notify(FEDERATION)
        await eventually(lambda: called(4))
        group.cancel_scope.cancel()


async def test_result_that_nobody_waits_for_any_more_is_dropped(training):
    await everybody_acts(training)
    stored = await training.service.ledger.read(FEDERATION)
    await training.driver.advance(FEDERATION)
    kept = training.blobs.keys(f"{FEDERATION}/r000001/")
    work = training.driver._works
    await work.run(stored, ComputeBasis(1))
    assert training.blobs.keys(f"{FEDERATION}/r000001/") == kept


async def test_sum_is_folded_as_ciphertexts_come_and_only_the_latest_is_kept(training):
    await everybody_acts(training)
    await training.work()
    for device in training.devices[:2]:
        await training.act(device)
        await training.work()
        sums = [key for key in training.blobs.keys(f"{FEDERATION}/r000001/") if key.endswith("/sum")]
        assert len(sums) == 1
    state = await state_of(training)
    assert [member.folded for member in state.round.cohort] == [True, True, False]


async def test_views_come_at_once_on_change_and_as_a_sign_of_life(training):
    device = training.devices[0]
    views = training.service.watch_view(device.identity, FEDERATION)
    first = await views.__anext__()
    assert (first.task, first.round, first.phase) == (AgentTask.FACTORS, 1, RoundPhase.TRAIN)
    assert first.rounds == training.spec.rounds
    assert first.negotiated_by == 3
    await training.act(device)
    second = await views.__anext__()
    assert (second.task, second.phase) == (AgentTask.WAIT, RoundPhase.FACTORS)
    received = []

    async def read_next() -> None:
        received.append(await views.__anext__())

    async with anyio.create_task_group() as group:
        group.start_soon(read_next)

        async def due() -> bool:
            return training.clock.sleepers > 0

        await eventually(due)
        await training.clock.advance(19.9)
        assert not received
        await training.clock.advance(0.2)
    assert received[0].now_ms == second.now_ms + 20_100
    await training.service.close()
    with pytest.raises(Draining):
        await views.__anext__()


async def test_view_is_for_registered_agents(running):
    with pytest.raises(UnknownAgent):
        await running.view(running.devices[4])


async def test_events_are_told_as_they_happen_from_any_point_on(world):
    events = world.service.watch_events(FEDERATION)
    assert (await events.__anext__()).kind == "federation_created"
    received = []

    async def read_two() -> None:
        received.extend([await events.__anext__(), await events.__anext__()])

    async with anyio.create_task_group() as group:
        group.start_soon(read_two)
        await anyio.lowlevel.checkpoint()
        await world.register(world.devices[0])
        await world.service.start_federation(FEDERATION)
    assert [(event.sequence, event.kind) for event in received] == [(2, "agent_registered"), (3, "federation_started")]
    assert received[0].agent == "agent-0"
    later = world.service.watch_events(FEDERATION, 2)
    assert (await later.__anext__()).sequence == 3
    await world.service.close()
    with pytest.raises(Draining):
        await later.__anext__()
    beyond = world.service.watch_events(FEDERATION, 2**64 - 1)
    with pytest.raises(Draining):
        await beyond.__anext__()


async def test_hub_never_misses_a_change_between_look_and_wait(world):
    hub = Hub(world.clock)
    signal = hub.signal("ward")
    hub.notify("ward")
    hub.notify("other")
    await hub.wait(signal, None)
    await hub.wait(signal, 1000.0)
    assert hub.signal("ward") is not signal


async def test_hub_waits_no_longer_than_asked(world):
    hub = Hub(world.clock)
    signal = hub.signal("ward")
    waiting = asyncio.create_task(hub.wait(signal, 10.0))
    await world.clock.advance(0)
    await world.clock.advance(9.0)
    assert not waiting.done()
    await world.clock.advance(1.0)
    assert waiting.done()
    assert not signal.is_set()


async def test_what_is_needed_no_more_is_looked_for_only_when_that_changes(training, monkeypatch):
    looked = []
    change = training.service.ledger.change

    async def counted(label, name, body):
        looked.append(label)
        return await change(label, name, body)

    monkeypatch.setattr(training.service.ledger, "change", counted)
    await training.driver.advance(FEDERATION)
    await training.driver.advance(FEDERATION)
    assert looked.count("find_unswept") <= 1
    looked.clear()
    for _ in range(3):
        await everybody_acts(training)
        await training.work()
    assert training.service.ledger.latest(FEDERATION).state.last_published_round >= 1
    assert looked.count("find_unswept") >= 1
    assert not [key for key in training.blobs.keys(f"{FEDERATION}/r000001/") if "/factors/" in key]


async def test_hub_wakes_those_whom_a_change_concerns(world):
    hub = Hub(world.clock)
    anybody, one, other = hub.signal("ward"), hub.signal("ward", "agent-1"), hub.signal("ward", "agent-2")
    elsewhere = hub.signal("clinic", "agent-1")
    hub.notify("ward", {"agent-1", "agent-3"})
    assert (anybody.is_set(), one.is_set(), other.is_set(), elsewhere.is_set()) == (True, True, False, False)
    assert hub.signal("ward", "agent-2") is other
    again = hub.signal("ward", "agent-1")
    hub.notify("ward")
    assert again.is_set()
    assert other.is_set()
    assert not elsewhere.is_set()
    hub.close()
    assert elsewhere.is_set()


async def test_agents_are_woken_by_what_concerns_them(training):
    first, second, third = training.devices[:3]
    await training.act(first)
    signals = {device.name: training.service.hub.signal(FEDERATION, device.name) for device in (first, second, third)}
    await training.act(second)
    assert [signal.is_set() for signal in signals.values()] == [False, True, False]
    await training.act(third)
    assert all(signal.is_set() for signal in signals.values())


async def test_only_the_last_rounds_are_kept_when_asked():
    folder = temporary_folder()
    async with World(folder, make_spec(rounds=4), DriverOptions(keep_rounds=2, resume_grace_s=5)) as world:
        for device in world.devices[:3]:
            await world.register(device)
        await world.service.start_federation(FEDERATION)
        for _ in range(9):
            await everybody_acts(world)
            await world.work()
            await world.check()
        assert world.verified == {1, 2, 3, 4}
        reader = world.devices[4]
        await world.register(reader)
        for number in (3, 4):
            await world.fetch(reader, PayloadKind.AVERAGE, number)
        for number in (1, 2):
            with pytest.raises(Exception, match="kept average"):
                await world.fetch(reader, PayloadKind.AVERAGE, number)
        with pytest.raises(UnknownRound):
            await world.fetch(reader, PayloadKind.AVERAGE, 5)
        await world.finish()
    remove(folder)


async def test_agents_get_time_after_a_restart(training):
    training.clock.advance(TRAIN_S * 3)
    await training.restart()
    state = await state_of(training)
    assert state.round.number == 1
    assert state.next_deadline_ms == training.clock.now_ms() + 5_000
