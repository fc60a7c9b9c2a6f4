"""Who is taken in, and for how long."""

from __future__ import annotations

import asyncio

import anyio
import pytest

from services.aggregator.turns import Turn
from services.common.transfer import Piece


async def pieces(size, wait_s, count=1000):
    for index in range(count):
        await asyncio.sleep(wait_s)
        yield Piece(index * size, bytes(size), 0)


async def read(turn, stream):
    iterator = stream.__aiter__()
    read = 0
    while (piece := await turn.next(iterator)) is not None:
        read += len(piece.data)
    return read


async def test_all_pieces_come_and_the_turn_lasts_until_it_is_ended():
    turns = asyncio.Semaphore(1)
    turn = Turn(turns)
    assert await read(turn, pieces(100, 0, count=5)) == 500
    assert turns.locked()
    turn.end()
    turn.end()
    assert not turns.locked()


@pytest.mark.parametrize("wait_s", [60, 0.02], ids=["silent", "drop by drop"])
async def test_a_slow_sender_keeps_nobody_waiting(wait_s):
    turns = asyncio.Semaphore(1)
    slow = asyncio.create_task(read(Turn(turns), pieces(10, wait_s)))
    await asyncio.sleep(0.05)
    assert turns.locked()
    other = Turn(turns)
    with anyio.fail_after(5):
        assert await read(other, pieces(1 << 20, 0, count=20)) == 20 << 20
    slow.cancel()
    other.end()


async def test_a_fast_sender_keeps_its_turn():
    turns = asyncio.Semaphore(1)
    turn = Turn(turns)
    await turn.take()
    other = asyncio.create_task(Turn(turns).take())
    assert await read(turn, pieces(1 << 20, 0.02, count=30)) == 30 << 20
    assert not other.done()
    turn.end()
    with anyio.fail_after(5):
        await other


async def one_by_one(*waits_s):
    for index, wait_s in enumerate(waits_s):
        await asyncio.sleep(wait_s)
        yield Piece(index << 20, bytes(1 << 20), 0)


async def test_a_slow_sender_waits_for_nobody_either():
    turns = asyncio.Semaphore(1)
    slow = asyncio.create_task(read(Turn(turns), one_by_one(0.4, 0.4, 0.4)))
    await asyncio.sleep(0.05)
    other = Turn(turns)
    with anyio.fail_after(5):
        await other.take()
        assert await slow == 3 << 20
    other.end()


async def test_a_sender_that_is_fast_again_needs_its_turn_again():
    turns = asyncio.Semaphore(1)
    hiccup = asyncio.create_task(read(Turn(turns), one_by_one(0.4, *[0] * 20)))
    await asyncio.sleep(0.05)
    other = Turn(turns)
    with anyio.fail_after(5):
        await other.take()
        await asyncio.sleep(0.6)
        assert not hiccup.done()
        other.end()
        assert await hiccup == 21 << 20
