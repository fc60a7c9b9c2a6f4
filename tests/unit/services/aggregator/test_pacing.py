from __future__ import annotations

import contextlib
import random

import pytest

from services.aggregator.pacing import STREAMS_PER_AGENT, Pace, Places
from services.common.grpc_errors import retry_after_s
from shelora.errors import QuotaExceeded
from shelora.rounds import Rules


def rules(phase_s: float = 3600) -> Rules:
    return Rules(10, 2, 1_000, 5_000_000, 5_000_000, int(1000 * phase_s))


def test_as_many_agents_as_places():
    places = Places(2)
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        assert first.enter_context(places.take("ward", "a"))
        assert second.enter_context(places.take("ward", "b"))
        with places.take("ward", "c") as stays:
            assert not stays
        with places.take("other", "a") as stays:
            assert not stays
        assert places.taken == 2
        first.close()
        assert not places.taken_by("ward", "a")
        assert places.taken_by("ward", "b")
        with places.take("ward", "c") as stays:
            assert stays
    assert places.taken == 0


def test_an_agent_s_streams_share_its_place():
    """An agent comes back before the aggregator has noticed that its last connection broke."""
    places = Places(1)
    with places.take("ward", "a") as one:
        with places.take("ward", "a") as other:
            assert one
            assert other
            assert places.taken == 1
        assert places.taken_by("ward", "a")
    assert places.taken == 0


def test_one_agent_cannot_open_streams_without_end():
    places = Places(5)
    with contextlib.ExitStack() as opened:
        for _ in range(STREAMS_PER_AGENT):
            assert opened.enter_context(places.take("ward", "a"))
        with pytest.raises(QuotaExceeded, match="open streams"):
            opened.enter_context(places.take("ward", "a"))
        assert opened.enter_context(places.take("ward", "b"))
    assert places.taken == 0


def test_the_more_agents_have_no_place_the_later_they_come_back():
    pace = Pace(100, random.Random(3))
    means = [
        sum(pace.come_back_s(agents, rules()) for _ in range(400)) / 400 for agents in (101, 140, 500, 2_100, 100_000)
    ]
    assert means == pytest.approx([1.0, 1.0, 10.0, 50.0, 300.0], rel=0.1)


def test_they_are_spread():
    pace = Pace(100, random.Random(3))
    waits = [pace.come_back_s(500, rules()) for _ in range(400)]
    assert 5.0 <= min(waits) < 6.0
    assert 14.0 < max(waits) <= 15.0


@pytest.mark.parametrize("phase_s", [4, 40])
def test_no_phase_ends_before_everybody_has_heard_of_it(phase_s):
    pace = Pace(100, random.Random(3))
    assert max(pace.come_back_s(100_000, rules(phase_s)) for _ in range(400)) < phase_s / 2


def test_a_transfer_without_a_place_is_told_when_to_try_again():
    pace = Pace(1, random.Random(3))
    with pace.transfer("ward", "a", 41, rules()):
        with pytest.raises(QuotaExceeded, match="1 agents at once") as refused, pace.transfer("ward", "b", 41, rules()):
            raise AssertionError("there was no place")
        wait_s = retry_after_s(refused.value)
        assert wait_s is not None
        assert 0.5 <= wait_s <= 1.5
    with pace.transfer("ward", "b", 41, rules()):
        assert pace.transfers.taken_by("ward", "b")
