from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.grpc_errors import RETRY_AFTER
from services.common.retry import Backoff, retrying
from shelora.errors import Draining, PeerUnreachable, QuotaExceeded, SheLoraError, WrongPhase
from support.clock import FakeClock


class Patient(FakeClock):
    """Time passes as soon as somebody sleeps."""

    def __init__(self) -> None:
        super().__init__()
        self.waits_s: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.waits_s.append(seconds)
        self.advance(seconds)


class Service:
    """Fails with the given errors, then answers."""

    def __init__(self, *errors: SheLoraError) -> None:
        self.errors = list(errors)
        self.calls = 0

    async def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "answer"


async def test_the_first_success_counts() -> None:
    clock, service = Patient(), Service()
    assert await retrying(service, clock=clock, rng=random.Random(1)) == "answer"
    assert (service.calls, clock.waits_s) == (1, [])


async def test_retryable_errors_are_tried_again_with_growing_waits() -> None:
    clock, service = Patient(), Service(*[PeerUnreachable("x")] * 8)
    told: list[float] = []
    answer = await retrying(
        service,
        clock=clock,
        rng=random.Random(1),
        first_wait_s=1.0,
        longest_wait_s=10.0,
        on_retry=lambda error, wait_s: told.append(wait_s),
    )
    assert (answer, service.calls) == ("answer", 9)
    assert told == clock.waits_s
    for wait_s, bound_s in zip(clock.waits_s, (1, 2, 4, 8, 10, 10, 10, 10), strict=True):
        assert bound_s / 2 <= wait_s <= bound_s


async def test_other_errors_are_raised_at_once() -> None:
    clock, service = Patient(), Service(WrongPhase("x"))
    with pytest.raises(WrongPhase):
        await retrying(service, clock=clock, rng=random.Random(1))
    assert (service.calls, clock.waits_s) == (1, [])


async def test_attempts_are_counted() -> None:
    clock, service = Patient(), Service(*[Draining("x")] * 5)
    with pytest.raises(Draining):
        await retrying(service, clock=clock, rng=random.Random(1), attempts=3)
    assert (service.calls, len(clock.waits_s)) == (3, 2)
    with pytest.raises(ValueError, match="at least 1"):
        await retrying(service, clock=clock, rng=random.Random(1), attempts=0)


async def test_no_try_begins_too_late() -> None:
    clock, service = Patient(), Service(*[Draining("x")] * 50)
    with pytest.raises(Draining):
        await retrying(service, clock=clock, rng=random.Random(1), until_s=clock.monotonic_s() + 20)
    assert 10 < clock.monotonic_s() <= 20


async def test_the_other_sides_wish_is_the_least_wait() -> None:
    clock = Patient()
    service = Service(QuotaExceeded("x", context={RETRY_AFTER: "42"}), Draining("x"))
    await retrying(service, clock=clock, rng=random.Random(1), longest_wait_s=5)
    assert clock.waits_s[0] == 42
    assert clock.waits_s[1] <= 1


@given(seed=st.integers(0, 2**32), first=st.floats(0.01, 10), longest=st.floats(10, 100))
def test_waits_stay_in_their_bounds(seed: int, first: float, longest: float) -> None:
    backoff = Backoff(random.Random(seed), first_wait_s=first, longest_wait_s=longest)
    for number in range(12):
        bound_s = min(first * 2**number, longest)
        assert bound_s / 2 <= backoff.next_s() <= bound_s
    backoff.reset()
    assert Backoff().next_s(WrongPhase("x")) <= 0.5
    assert backoff.next_s() <= first
