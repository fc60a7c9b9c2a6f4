"""Trying again, with patience and jitter."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from services.common.clock import Clock
from services.common.grpc_errors import retry_after_s
from shelora.errors import SheLoraError

Result = TypeVar("Result")

_logger = structlog.get_logger(__name__)


class Backoff:
    """Growing waits with jitter: wait k is drawn uniformly from the upper half of [0, first_wait_s * 2^(k-1)], bounded.

    Args:
        rng: draws the jitter; None means one of its own.
        first_wait_s: bound of the first wait, seconds.
        longest_wait_s: bound of all waits of our own, seconds.
    """

    def __init__(
        self, rng: random.Random | None = None, *, first_wait_s: float = 0.5, longest_wait_s: float = 30.0
    ) -> None:
        self._rng = rng or random.Random()  # noqa: S311 - spreads waits, protects nothing
        self._first_wait_s = first_wait_s
        self._longest_wait_s = longest_wait_s
        self._bound_s = first_wait_s

    def next_s(self, error: SheLoraError | None = None) -> float:
        """The next wait in seconds; at least the delay that the other side asked for with the error, if it did."""
        wait_s = self._rng.uniform(0.5, 1.0) * self._bound_s
        self._bound_s = min(2 * self._bound_s, self._longest_wait_s)
        asked_s = retry_after_s(error) if error is not None else None
        return max(wait_s, asked_s or 0.0)

    def reset(self) -> None:
        """Begin again with the first wait, after a success."""
        self._bound_s = self._first_wait_s


async def retrying(
    function: Callable[[], Awaitable[Result]],
    *,
    clock: Clock,
    rng: random.Random,
    attempts: int | None = None,
    until_s: float | None = None,
    first_wait_s: float = 0.5,
    longest_wait_s: float = 30.0,
    on_retry: Callable[[SheLoraError, float], None] | None = None,
) -> Result:
    """Call a function until it succeeds, fails for good, or patience ends.

    Only errors of the tree with retryable = True are tried again, after the waits of a Backoff; a delay that the other
    side asked for (RetryInfo) is the least wait.

    Args:
        function: makes the awaitable of one try.
        clock: for the waits.
        rng: draws the jitter.
        attempts: most tries, at least 1; None for no bound.
        until_s: no try begins after this time on clock.monotonic_s(); None for no bound.
        first_wait_s: longest wait before the second try, seconds.
        longest_wait_s: bound of all waits of our own, seconds.
        on_retry: told the error and the wait in seconds before each wait.

    Returns:
        What the function returns.

    Raises:
        ValueError: attempts is below 1.
        SheLoraError: the last error.
    """
    if attempts is not None and attempts < 1:
        raise ValueError(f"retrying: expected at least 1 attempt, got {attempts}")
    backoff = Backoff(rng, first_wait_s=first_wait_s, longest_wait_s=longest_wait_s)
    attempt = 0
    while True:
        attempt += 1
        try:
            return await function()
        except SheLoraError as error:
            wait_s = backoff.next_s(error)
            last = attempts is not None and attempt >= attempts
            late = until_s is not None and clock.monotonic_s() + wait_s > until_s
            if not error.retryable or last or late:
                raise
            if on_retry is not None:
                on_retry(error, wait_s)
            _logger.debug("tried in vain, trying again", code=error.code, attempt=attempt, wait_s=round(wait_s, 3))
        await clock.sleep(wait_s)
