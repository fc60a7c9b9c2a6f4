"""What Prometheus gets to know about federations: every end of a round once, and nothing from a restart."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from services.aggregator.federation_metrics import FederationMetrics
from shelora.rounds import RoundPhase
from simulation.devices import FEDERATION
from simulation.world import CIPHER_S, TRAIN_S, World, make_spec, remove, temporary_folder


@pytest.fixture(params=["sqlite", "postgresql"])
async def world_of_nine_rounds(request):
    """On both databases: sums come in other types from each. For one test only, as nobody empties the second."""
    url = request.getfixturevalue("postgresql_url") if request.param == "postgresql" else None
    folder = temporary_folder()
    async with World(folder, make_spec(rounds=9), url=url) as opened:
        yield opened
    remove(folder)


async def shown(world: World) -> CollectorRegistry:
    """The figures of a process that has just started."""
    registry = CollectorRegistry()
    await FederationMetrics(world.service, registry, world.clock).refresh()
    return registry


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(f"shelora_federation_{name}", {"federation": FEDERATION, **labels})


def ended(registry: CollectorRegistry, outcome: str, reason: str = "") -> float | None:
    return value(registry, "ended_rounds_total", outcome=outcome, reason=reason)


def history(registry: CollectorRegistry) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """All samples but times of creation."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in registry.collect()
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


async def publish(world: World, members: int = 3) -> None:
    """One round in which the first agents take part; time passes in training and in encrypting."""
    world.clock.advance(2)
    for device in world.devices[:3]:
        await world.act(device)
    await world.work()
    world.clock.advance(3)
    for device in world.devices[:members]:
        await world.act(device)
    await world.wait(CIPHER_S if members < 3 else 0)


async def test_every_end_of_a_round_is_counted_once_whatever_restarts(world_of_nine_rounds):
    running = world_of_nine_rounds
    for device in running.devices[:3]:
        await running.register(device)
    await running.service.start_federation(FEDERATION)
    registry = CollectorRegistry()
    metrics = FederationMetrics(running.service, registry, running.clock)
    await metrics.refresh()
    assert ended(registry, "published") == ended(registry, "abandoned", "no_factors") == 0
    for device in running.devices[:3]:
        await running.act(device)
    await running.work()
    await publish(running)
    await metrics.refresh()
    await publish(running, members=2)
    await metrics.refresh()
    await running.wait(TRAIN_S)
    await running.act(running.devices[0])
    await running.wait(TRAIN_S)
    for device in running.devices[:3]:
        await running.act(device)
    await running.work()
    await running.act(running.devices[0])
    await running.wait(CIPHER_S)
    await running.service.stop_federation(FEDERATION, "maintenance")
    await metrics.refresh()
    await metrics.refresh()

    rounds = await running.service.list_rounds(FEDERATION)
    assert [found.phase for found in rounds] == [RoundPhase.PUBLISHED] * 2 + [RoundPhase.ABANDONED] * 4
    assert ended(registry, "published") == 2
    for reason in ("no_factors", "too_few_factors", "too_few_ciphertexts", "federation_stopped"):
        assert ended(registry, "abandoned", reason) == 1, reason
    published = [found for found in rounds if found.phase is RoundPhase.PUBLISHED]
    for phase in ("train", "factors", "cipher"):
        spent_s = sum(found.phase_seconds.get(phase, 0.0) for found in published)
        assert value(registry, "phase_seconds_total", phase=phase) == pytest.approx(spent_s)
    assert value(registry, "published_timestamp_seconds") == published[-1].ended_at_ms / 1000
    assert value(registry, "published_members", outcome="counted") == 2
    assert value(registry, "published_members", outcome="left_out") == 1
    sent = sum(member.cipher_bytes for found in rounds for member in found.members)
    assert value(registry, "payload_bytes_total", kind="cipher") == sent > 0
    assert value(registry, "state", state="stopped") == 1

    before = history(registry)
    await running.restart()
    after = history(await shown(running))
    assert {name: found for name, found in after.items() if "stored_bytes" not in name[0]}.items() <= before.items()


async def test_agents_are_away_or_at_their_task(training):
    registry = await shown(training)
    assert value(registry, "agents_by_state", state="away") == value(registry, "agents") == 3
    views = training.service.watch_view(training.devices[0].identity, FEDERATION)
    await anext(views)
    registry = await shown(training)
    assert value(registry, "agents_by_state", state="away") == 2
    assert value(registry, "agents_by_state", state="factors") == value(registry, "connected_agents") == 1
    await views.aclose()


async def test_members_of_the_running_round_and_bytes_that_go_away_again(training):
    registry = CollectorRegistry()
    metrics = FederationMetrics(training.service, registry, training.clock)
    await training.act(training.devices[0])
    await metrics.refresh()
    assert value(registry, "round_members", state="factors") == 1
    assert value(registry, "round_members", state="cohort") == 0
    assert value(registry, "phase", phase="factors") == 1
    assert (value(registry, "stored_bytes", kind="factors") or 0) > 0
    await training.leave(training.devices[0])
    await metrics.refresh()
    assert value(registry, "round_members", state="left") == 1
    await training.wait(TRAIN_S)
    await metrics.refresh()
    assert value(registry, "stored_bytes", kind="factors") == 0
    assert (value(registry, "payload_bytes_total", kind="factors") or 0) > 0


async def test_means_are_of_known_figures_of_the_last_published_round(training):
    await publish(training)
    for device, accuracy in zip(training.devices[:3], (0.5, 0.7, 0.9), strict=True):
        figures = {"accuracy_after": accuracy, "seconds_he_encrypt": 2.0, "my own figure": 1.0}
        await training.service.report_round(device.identity, FEDERATION, 1, figures)
    registry = await shown(training)
    assert value(registry, "reports") == 3
    assert value(registry, "reported_accuracy_ratio", when="after") == pytest.approx(0.7)
    assert value(registry, "reported_seconds", step="he_encrypt") == 2.0
    assert value(registry, "reported_seconds", step="evaluate") is None
    assert not [name for name, _ in history(registry) if "own" in name]
