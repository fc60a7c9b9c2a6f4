from __future__ import annotations

import asyncio

import pytest

from services.client_agent.domain import Activity, Status
from services.client_agent.progress import StatusBoard
from shelora.errors import PeerUnreachable


@pytest.fixture
async def board() -> StatusBoard:
    return StatusBoard(Status("a", "ward", 4, "full"))


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_reports_come_from_any_thread_and_stay_between_0_and_1(board):
    report = board.begin(Activity.TRAINING, "round 1")
    assert (board.status.activity, board.status.fraction, board.status.detail) == (Activity.TRAINING, 0.0, "round 1")
    await asyncio.to_thread(report, 0.5, "step 1 of 2")
    await settle()
    assert (board.status.fraction, board.status.detail) == (0.5, "step 1 of 2")
    report(7.0, "")
    await settle()
    assert (board.status.fraction, board.status.detail) == (1.0, "round 1")


async def test_a_late_report_does_not_disturb_the_next_activity(board):
    late = board.begin(Activity.TRAINING, "round 1")
    board.begin(Activity.WAITING, "for the cohort")
    await asyncio.to_thread(late, 0.9, "step 9 of 10")
    await settle()
    assert (board.status.activity, board.status.fraction, board.status.detail) == (
        Activity.WAITING,
        0.0,
        "for the cohort",
    )


async def test_watchers_see_the_present_then_the_newest_until_the_end(board):
    watching = board.watch()
    assert (await anext(watching)).activity is Activity.IDLE
    following = asyncio.ensure_future(anext(watching))
    await settle()
    assert not following.done()
    board.update(round=1)
    board.update(round=2)
    assert (await following).round == 2
    board.update(round=3)
    board.update(round=4)
    assert (await anext(watching)).round == 4
    board.begin(Activity.ENDED)
    assert (await anext(watching)).activity is Activity.ENDED
    with pytest.raises(StopAsyncIteration):
        await anext(watching)


async def test_every_watcher_is_woken(board):
    watchers = [board.watch() for _ in range(3)]
    for watcher in watchers:
        await anext(watcher)
    waiting = [asyncio.ensure_future(anext(watcher)) for watcher in watchers]
    await settle()
    board.update(round=9)
    assert [status.round for status in await asyncio.gather(*waiting)] == [9, 9, 9]


async def test_readiness_is_the_connection_with_the_reason_while_there_is_none(board):
    board.begin(Activity.PREPARING, "loading model and data")
    assert board.readiness() == {
        "ready": False,
        "reason": "preparing: loading model and data",
        "activity": "preparing",
        "detail": "loading model and data",
        "round": 0,
        "applied_round": 0,
        "paused": False,
        "last_error": "",
    }
    board.connect()
    board.update(round=2, applied_round=1, paused=True)
    found = board.readiness()
    assert (found["ready"], found["round"], found["applied_round"], found["paused"]) == (True, 2, 1, True)
    assert "reason" not in found
    board.disconnect()
    board.failed(PeerUnreachable("no answer", hint="check the network"))
    found = board.readiness()
    assert (found["ready"], found["reason"]) == (False, "no answer (check the network)")


async def test_errors_are_shown_and_counted_by_code(board):
    board.failed(PeerUnreachable("no answer"))
    board.failed(KeyError("a defect"))
    board.failed(PeerUnreachable("no answer"))
    assert board.errors == {"peer_unreachable": 2, "internal_fault": 1}
    assert board.status.last_error == "no answer"
    board.failed(KeyError("a defect"))
    assert board.status.last_error == "KeyError: 'a defect'"
