"""Waits that must not last too long."""

from __future__ import annotations

import asyncio
import contextlib

from services.common.patience import Patience

LONGEST_S = 0.1


class Waits:
    def __init__(self):
        self.calls = []
        self.patience = Patience(LONGEST_S, self._give_up)

    def _give_up(self):
        self.calls.append(1)

    async def wait(self, seconds):
        self.patience.begin()
        await asyncio.sleep(seconds)
        self.patience.end()


async def test_a_long_wait_is_given_up_once_and_while_it_lasts():
    waits = Waits()
    waits.patience.begin()
    await asyncio.sleep(3 * LONGEST_S)
    assert len(waits.calls) == 1
    waits.patience.end()
    await waits.wait(3 * LONGEST_S)
    assert len(waits.calls) == 2


async def test_short_waits_do_not_add_up():
    waits = Waits()
    for _ in range(30):
        await waits.wait(LONGEST_S / 10)
    await asyncio.sleep(2 * LONGEST_S)
    assert not waits.calls


async def test_a_wait_that_begins_late_has_its_whole_time():
    waits = Waits()
    await waits.wait(0)
    await asyncio.sleep(0.7 * LONGEST_S)
    waits.patience.begin()
    await asyncio.sleep(0.6 * LONGEST_S)
    assert not waits.calls
    await asyncio.sleep(LONGEST_S)
    assert len(waits.calls) == 1


async def test_closed_means_never_again():
    waits = Waits()
    with contextlib.closing(waits.patience):
        waits.patience.begin()
    await asyncio.sleep(2 * LONGEST_S)
    assert not waits.calls
