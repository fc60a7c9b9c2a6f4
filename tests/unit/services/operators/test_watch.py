"""The watcher and the client behind it, against a real gRPC server on a Unix socket that plays a script."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from rich.console import Console

from services.common.channel import open_channel
from services.common.clock import SystemClock
from services.common.codec import parameters_to_proto, plan_to_proto, shapes_to_proto
from services.common.grpc_errors import ErrorInterceptor
from services.common.keymanager_client import KeyManagerClient
from services.operators.client import AgentControlClient, FederationClient
from services.operators.codec import spec_from_proto, spec_to_proto
from services.operators.demo.processes import Crew
from services.operators.demo.watch import (
    Board,
    LineDisplay,
    Progress,
    follow_federation,
    following,
    open_display,
    render_board,
)
from services.operators.domain import AgentProgress, Federation, FederationSpec, RegisteredAgent, Round
from services.operators.profile import OperatorProfile
from services.operators.session import Session
from shelora.errors import FederationEnded, InternalFault, MalformedPayload, UnknownFederation
from shelora.plan import Negotiation, Packing
from shelora.rounds.phases import AgentTask, FederationState, RoundPhase
from shelora.v1 import agent_pb2, agent_pb2_grpc, aggregator_pb2, aggregator_pb2_grpc
from support.operators import PARAMETERS, make_plan

pytestmark = pytest.mark.anyio
SPEC = FederationSpec("demo", 1, 2, 2, 1, PARAMETERS)
NAMES = ("agent-1", "agent-2")
TASK = aggregator_pb2.AGENT_TASK_FACTORS


def round_message(phase: Any, number: int = 1, **metrics: float) -> aggregator_pb2.Round:
    members = [
        aggregator_pb2.RoundMember(
            agent=name, rank=4, encrypted_columns=[8, 8], examples=10, weight=0.5, counted=True, metrics=metrics
        )
        for name in NAMES
    ]
    return aggregator_pb2.Round(
        number=number,
        phase=phase,
        plan_version=1,
        members=members,
        phase_seconds={"sum": 3.0, "train": 1.0, "later": 9.0},
        member_count=len(members),
        complete_count=sum(member.cipher_complete for member in members),
    )


def federation_message(state: Any, phase: Any = 0, reason: str = "") -> aggregator_pb2.Federation:
    message = aggregator_pb2.Federation(spec=spec_to_proto(SPEC), state=state, agents=2, reason=reason)
    message.signature.shapes.CopyFrom(shapes_to_proto(make_plan().shapes))
    message.signature.task = "sequence-classification"
    if phase:
        message.plan.CopyFrom(plan_to_proto(make_plan()))
        message.round.CopyFrom(round_message(phase))
    return message


class Control(agent_pb2_grpc.AgentControlServiceServicer):
    """An agent in the middle of its training; nothing but its progress is asked for here."""

    async def refuse(self, request: Any, context: Any) -> Any:
        raise AssertionError(f"not to be asked: {request}")

    GetStatus = Start = Pause = Stop = ExportAdapter = refuse

    async def WatchProgress(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802 - the contract's name
        status = agent_pb2.AgentStatus(name="agent-1", activity=agent_pb2.AGENT_ACTIVITY_TRAINING, round=1, rounds=3)
        yield agent_pb2.WatchProgressResponse(status=status, fraction=0.25, detail="round 1")


class Script(aggregator_pb2_grpc.FederationServiceServicer):
    """Answers with one scene after the other; the last one stays."""

    def __init__(self, scenes: Sequence[tuple[aggregator_pb2.Federation, list[aggregator_pb2.Round]]]) -> None:
        self.scenes = list(scenes)
        self.asked: list[Any] = []

    async def GetFederation(self, request: Any, context: Any) -> Any:  # noqa: N802 - the contract's name
        if request.federation != "demo":
            raise UnknownFederation(f"no federation {request.federation!r}", hint="list them")
        return aggregator_pb2.GetFederationResponse(federation=self.scenes[0][0])

    async def ListRounds(self, request: Any, context: Any) -> Any:  # noqa: N802 - the contract's name
        scene = self.scenes.pop(0) if len(self.scenes) > 1 else self.scenes[0]
        for found in scene[1]:
            yield aggregator_pb2.ListRoundsResponse(round=found)

    async def ListAgents(self, request: Any, context: Any) -> Any:  # noqa: N802 - the contract's name
        for name in NAMES:
            agent = aggregator_pb2.Agent(
                name=name, rank=4, encrypted_columns=[8, 8], budget="25%", task=TASK, connected=True
            )
            yield aggregator_pb2.ListAgentsResponse(agent=agent)

    async def ListFederations(self, request: Any, context: Any) -> Any:  # noqa: N802 - the contract's name
        return aggregator_pb2.ListFederationsResponse(federations=[self.scenes[0][0]])

    async def CreateFederation(self, request: Any, context: Any) -> Any:  # noqa: N802 - the contract's name
        self.asked.append(request)
        return aggregator_pb2.CreateFederationResponse(federation=self.scenes[0][0])

    async def StartFederation(self, request: Any, context: Any) -> Any:  # noqa: N802 - the contract's name
        self.asked.append(request)
        return aggregator_pb2.StartFederationResponse(federation=self.scenes[0][0])

    async def StopFederation(self, request: Any, context: Any) -> Any:  # noqa: N802 - the contract's name
        self.asked.append(request)
        return aggregator_pb2.StopFederationResponse(federation=self.scenes[0][0])

    async def AdoptEpoch(self, request: Any, context: Any) -> Any:  # noqa: N802 - the contract's name
        self.asked.append(request)
        return aggregator_pb2.AdoptEpochResponse(federation=self.scenes[0][0])

    async def WatchEvents(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802 - the contract's name
        for sequence in (request.after + 1, request.after + 2):
            yield aggregator_pb2.WatchEventsResponse(sequence=sequence, at_ms=5, kind="round_opened", round=1)


@contextlib.asynccontextmanager
async def serving(script: Script, path: Path) -> AsyncIterator[grpc.aio.Channel]:
    server = grpc.aio.server(interceptors=[ErrorInterceptor()])
    aggregator_pb2_grpc.add_FederationServiceServicer_to_server(script, server)
    agent_pb2_grpc.add_AgentControlServiceServicer_to_server(Control(), server)
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    try:
        async with open_channel(f"unix:{path}", None) as channel:
            yield channel
    finally:
        await server.stop(None)


RUNNING = federation_message(aggregator_pb2.FEDERATION_STATE_RUNNING, aggregator_pb2.ROUND_PHASE_CIPHER)
FINISHED = federation_message(aggregator_pb2.FEDERATION_STATE_FINISHED, aggregator_pb2.ROUND_PHASE_PUBLISHED)
STOPPED = federation_message(aggregator_pb2.FEDERATION_STATE_STOPPED, reason="enough")
PUBLISHED = aggregator_pb2.ROUND_PHASE_PUBLISHED


async def test_client_brings_domain_values_and_errors_of_the_tree(tmp_path) -> None:
    script = Script([(RUNNING, [round_message(PUBLISHED, accuracy_after=0.5)])])
    async with serving(script, tmp_path / "s") as channel:
        client = FederationClient(channel)
        found = await client.get("demo")
        assert found.state is FederationState.RUNNING
        assert found.spec == replace(SPEC, negotiation=None)
        assert found.plan == make_plan()
        assert found.shapes == make_plan().shapes
        assert found.round is not None
        assert found.round.phase is RoundPhase.CIPHER
        rounds = await client.rounds("demo")
        assert rounds[0].counted == NAMES
        assert list(rounds[0].phase_seconds) == ["train", "sum", "later"]
        assert (await client.agents("demo"))[0] == RegisteredAgent(
            "agent-1", 4, (8, 8), "25%", "", 0, True, AgentTask.FACTORS, 0
        )
        assert [federation.spec.federation for federation in await client.list_all()] == ["demo"]
        assert [event.sequence async for event in client.events("demo", 6)] == [7, 8]
        assert [seen.activity async for seen in AgentControlClient(channel).watch()] == ["training"]
        with pytest.raises(UnknownFederation, match="no federation 'other'"):
            await client.get("other")


async def test_lists_may_be_longer_than_a_message(tmp_path) -> None:
    long = [round_message(PUBLISHED, number) for number in (1, 2, 3)]
    for found in long:
        found.reason = "x" * (3 << 20)
    script = Script([(RUNNING, long)])
    async with serving(script, tmp_path / "s") as channel:
        assert len(await FederationClient(channel).rounds("demo")) == 3


async def test_client_sends_what_it_was_given(tmp_path) -> None:
    script = Script([(RUNNING, [])])
    spec = replace(SPEC, negotiation=Negotiation.OPE, basis_cap=7, renegotiate_every=2, max_abandoned=5)
    spec = replace(spec, packing=Packing.DENSE)
    async with serving(script, tmp_path / "s") as channel:
        client = FederationClient(channel)
        await client.create(spec)
        await client.start("demo", 4)
        await client.stop("demo", "enough")
        await client.adopt("demo", 3, PARAMETERS)
    created, started, stopped, adopted = script.asked
    assert spec_from_proto(created.spec) == spec
    assert (started.federation, started.more_rounds) == ("demo", 4)
    assert (stopped.federation, stopped.reason) == ("demo", "enough")
    assert (adopted.epoch, adopted.parameters) == (3, parameters_to_proto(PARAMETERS))


async def test_a_state_of_the_future_is_refused_clearly(tmp_path) -> None:
    script = Script([(federation_message(99), [])])
    async with serving(script, tmp_path / "s") as channel:
        with pytest.raises(MalformedPayload, match="FederationState: expected one of"):
            await FederationClient(channel).get("demo")


class Watched:
    """A federation followed to its end, with processes that end as told."""

    def __init__(self, tmp_path: Path, programs: dict[str, str]) -> None:
        self.clock = SystemClock()
        self.crew = Crew(os.environ, tmp_path, self.clock)
        for name, program in programs.items():
            self.crew.start(name, ["-c", program])
        self.board = Board(dict.fromkeys(NAMES, "rank 4"), self.clock.monotonic_s())
        self.output = io.StringIO()
        self.display = LineDisplay(Console(file=self.output, width=120), self.board, self.clock.monotonic_s)
        self.planned: list[tuple[Federation, Sequence[RegisteredAgent]]] = []
        self.shown: list[Round] = []

    async def follow(self, script: Script, path: Path) -> list[Round]:
        progress = Progress(lambda federation, agents: self.planned.append((federation, agents)), self.shown.append)
        profile = OperatorProfile(federation="demo", aggregator="127.0.0.1:1", identity_dir=path.parent)
        async with serving(script, path) as channel:
            session = Session(profile, FederationClient(channel), KeyManagerClient(channel))
            try:
                return await follow_federation(session, self.crew, self.board, self.display, self.clock, progress)
            finally:
                self.crew.kill()


LONG = "import time; time.sleep(600)"
SERVICES = {"keymanager": LONG, "aggregator": LONG}


async def wait_for_agents(watched: Watched) -> None:
    for name in NAMES:
        watched.crew.workers[name].process.wait()


async def test_an_agent_that_is_killed_after_the_end_has_not_ended_well(tmp_path) -> None:
    watched = Watched(tmp_path, {**SERVICES, **dict.fromkeys(NAMES, LONG)})

    class Ending(Script):
        async def ListRounds(self, request: Any, context: Any) -> Any:  # noqa: N802 - the contract's name
            async for answer in super().ListRounds(request, context):
                yield answer
            if self.scenes[0][0] is FINISHED:
                watched.crew.kill(NAMES)

    waiting, reported = round_message(PUBLISHED), round_message(PUBLISHED, accuracy_after=0.5)
    script = Ending([(RUNNING, [waiting]), (RUNNING, [reported]), (RUNNING, [reported]), (FINISHED, [reported])])
    with pytest.raises(InternalFault, match="agent-1 ended with signal SIGKILL"):
        await watched.follow(script, tmp_path / "s")
    assert len(watched.planned) == 1
    assert [found.number for found in watched.shown] == [1]
    assert "accuracy_after" in watched.shown[0].members[0].metrics


async def test_all_ended_well_is_the_end_and_every_round_is_shown_once(tmp_path) -> None:
    watched = Watched(tmp_path, {**SERVICES, **dict.fromkeys(NAMES, "pass")})
    await wait_for_agents(watched)
    rounds = await watched.follow(Script([(FINISHED, [round_message(PUBLISHED)])]), tmp_path / "s")
    assert [found.number for found in rounds] == [1]
    assert [found.number for found in watched.shown] == [1]
    assert "agent-1: done" in watched.output.getvalue()


@pytest.mark.parametrize(
    ("programs", "scene", "error", "message"),
    [
        ({"agent-2": "raise SystemExit(1)"}, RUNNING, InternalFault, "agent-2 ended with exit status 1"),
        ({"agent-2": "pass"}, RUNNING, InternalFault, "exit status 0 before the federation had finished"),
        ({"aggregator": "raise SystemExit(2)"}, RUNNING, InternalFault, "aggregator ended with exit status 2"),
        ({"agent-1": "raise SystemExit(1)"}, STOPPED, FederationEnded, "stopped: enough"),
    ],
)
async def test_whatever_ends_too_early_is_named(tmp_path, programs, scene, error, message) -> None:
    watched = Watched(tmp_path, {**SERVICES, **dict.fromkeys(NAMES, LONG), **programs})
    for name in programs:
        watched.crew.workers[name].process.wait()
    with pytest.raises(error, match=message):
        await watched.follow(Script([(scene, [])]), tmp_path / "s")


async def test_agents_progress_reaches_the_board(tmp_path) -> None:
    clock = SystemClock()
    board = Board({"agent-1": "rank 4"}, clock.monotonic_s())
    output = io.StringIO()
    display = LineDisplay(Console(file=output, width=120), board, clock.monotonic_s)
    address = f"unix:{tmp_path / 's'}"
    async with (
        serving(Script([(RUNNING, [])]), tmp_path / "s"),
        following({"agent-1": address}, board, display, clock),
    ):
        while "agent-1" not in board.progress:
            await clock.sleep(0.01)
    assert board.progress["agent-1"].fraction == 0.25
    assert "agent-1: training" in output.getvalue()


def shown(board: Board) -> str:
    console = Console(width=120, file=io.StringIO())
    with console.capture() as capture:
        console.print(render_board(board, 61.0))
    return capture.get()


def progress(activity: str, detail: str = "") -> AgentProgress:
    return AgentProgress("agent-1", activity, 0.5, detail, 1, 3, 0, "")


def test_board_shows_time_phase_and_everybody() -> None:
    board = Board({"agent-1": "rank 4, full", "agent-2": "rank 8, 5%"}, 0.0, step="starting things")
    first = shown(board)
    assert "01:01" in first
    assert "starting things" in first
    board.progress["agent-1"] = progress("training", "step 3 of 30")
    board.ended.add("agent-2")
    second = shown(board)
    assert "training: step 3 of 30" in second
    assert "done" in second
    assert "rank 8, 5%" in second


async def test_terminal_gets_a_live_view_and_a_pipe_plain_lines(tmp_path) -> None:
    board = Board({"agent-1": "rank 4"}, 0.0)
    pipe = io.StringIO()
    with open_display(Console(file=pipe), board, SystemClock()) as display:
        display.refresh()
        display.refresh()
        display.show("a table")
    assert pipe.getvalue().count("agent-1: starting") == 1
    assert "a table" in pipe.getvalue()
    assert "\x1b" not in pipe.getvalue()
    terminal = io.StringIO()
    with open_display(Console(file=terminal, force_terminal=True, width=80), board, SystemClock()) as display:
        display.refresh()
        display.show("a table")
    assert "agent-1" in terminal.getvalue()
    assert "a table" in terminal.getvalue()
    assert "\x1b" in terminal.getvalue()
