"""The `shelora` command line against a real key manager and a real aggregator over mutual TLS."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import structlog
from typer.testing import CliRunner

from services.common.clock import SystemClock
from services.common.enrolment import Enrolment
from services.common.identity import Role
from services.operators.cli import app
from services.operators.demo.folder import DemoFolder, take_folder
from services.operators.demo.options import choose
from services.operators.demo.processes import Crew
from services.operators.demo.stage import AGGREGATOR, KEYMANAGER, Stage, environment

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(300)


@dataclass(frozen=True)
class Answer:
    """What a command said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@dataclass(frozen=True)
class Control:
    """A federation's services, and the command line that talks to them."""

    folder: DemoFolder
    crew: Crew
    stage: Stage

    def run(self, *arguments: str) -> Answer:
        done = CliRunner().invoke(app, [*arguments, "--profile", str(self.folder.profile)])
        return Answer(done.exit_code, done.stdout, done.stderr)

    def json(self, *arguments: str) -> Any:
        answer = self.run(*arguments, "--json")
        assert answer.code == 0, answer
        return answer.json

    def refused(self, *arguments: str) -> tuple[int, str]:
        """Exit code and error code of a command that fails."""
        answer = self.run(*arguments, "--json")
        return answer.code, json.loads(answer.err)["error"]["code"]


@pytest.fixture(autouse=True)
def restored_logs() -> Iterator[None]:
    """Commands point the logs at the standard error of their moment; put back what was there."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers, root.level = handlers, level
    structlog.reset_defaults()


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Control]:
    options = choose(
        data=None, test=None, model="embedded", agents=2, rounds=2, ranks="4,8", budgets="full", compare=None,
        out=tmp_path_factory.mktemp("operators") / "demo",
    )  # fmt: skip
    with take_folder(options.out) as folder:
        crew = Crew(environment(options, os.environ), folder.logs, SystemClock())
        stage = Stage(options, folder, crew, SystemClock(), ("a", "b"), 10)

        async def start() -> None:
            profile = stage.write()
            await stage.start_keymanager()
            async with stage.operator(profile) as session:
                await stage.invite(session)
                await stage.start_aggregator()

        try:
            asyncio.run(start())
            yield Control(folder, crew, stage)
        finally:
            crew.kill()


def test_life_of_a_federation(control: Control, tmp_path: Path) -> None:
    assert control.json("federation", "list") == []
    assert control.refused("federation", "status") == (1, "unknown_federation")

    large = ("federation", "create", "--rounds", "2", "--agents", "4097", "--packing", "dense")
    assert control.refused(*large) == (1, "invalid_plan")
    create = ("federation", "create", "--rounds", "2", "--agents", "2", "--packing", "dense")
    made = control.json(*create)
    assert made["state"] == "created"
    assert made["spec"]["parameters"]["ring_dimension"] == 4096
    assert made["spec"]["packing"] == "dense"
    assert control.json(*create)["created_at_ms"] == made["created_at_ms"]
    assert control.refused("federation", "create", "--rounds", "3", "--agents", "2") == (1, "federation_exists")
    assert [federation["spec"]["rounds"] for federation in control.json("federation", "list")] == [2]

    started = control.json("federation", "start")
    assert started["state"] == "gathering"
    assert (started["preflight"]["registered"], started["preflight"]["target"]) == (0, 2)
    assert "no agent of 2 has registered" in control.run("federation", "start").out
    status = control.json("federation", "status")
    assert (status["federation"]["agents"], status["agents"]) == (0, [])
    assert "gathering" in control.run("federation", "status").out
    assert control.json("federation", "rounds") == []
    assert control.json("agents", "list") == []
    assert control.refused("plan", "explain", "--ranks", "4") == (1, "invalid_plan")

    check_members_and_keys(control, tmp_path)

    watching = subprocess.Popen(
        [sys.executable, "-m", "services.operators.cli", "federation", "status", "--watch", "--json"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "SHELORA_PROFILE": str(control.folder.profile)},
    )
    assert watching.stdout is not None
    assert json.loads(watching.stdout.readline())["federation"]["state"] == "gathering"
    assert control.json("federation", "stop", "--reason", "seen enough")["reason"] == "seen enough"
    rest, _ = watching.communicate(timeout=60)
    assert json.loads(rest.splitlines()[-1])["federation"]["state"] == "stopped"
    assert watching.returncode == 4
    stopped = control.run("federation", "status")
    assert stopped.code == 4
    assert "seen enough" in stopped.out
    assert control.json("federation", "start")["state"] == "gathering"
    assert control.json("federation", "stop")["state"] == "stopped"


def check_members_and_keys(control: Control, tmp_path: Path) -> None:
    """Tokens, revocation, epochs, audit log."""
    file = tmp_path / "agent-9.json"
    token = control.json("agents", "token", "agent-9", "--out", str(file))
    enrolment = Enrolment.load(file)
    assert token["identity"] == "spiffe://demo/agent/agent-9"
    assert (enrolment.role, enrolment.name) == (Role.AGENT, "agent-9")
    ports = control.stage.ports
    assert enrolment.keymanager == f"127.0.0.1:{ports.keymanager}"
    assert enrolment.enrolment == f"127.0.0.1:{ports.enrolment}"
    invited = Enrolment.load(control.folder.aggregator / "enrolment.json")
    assert (invited.role, invited.keymanager) == (Role.AGGREGATOR, f"127.0.0.1:{ports.membership}")
    lost = ("agents", "token", "agent-10", "--out", str(tmp_path / "absent" / "agent-10.json"))
    assert control.refused(*lost) == (1, "invalid_configuration")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert enrolment.token not in json.dumps(token)
    assert control.refused("agents", "token", "Agent!", "--out", str(file)) == (1, "invalid_identifier")

    assert [epoch["state"] for epoch in control.json("keys", "epochs")] == ["current"]
    rotated = control.json("keys", "rotate", "--reason", "spring cleaning", "--no-adopt")
    assert (rotated["epoch"]["number"], rotated["adoption"]["adopted"]) == (2, False)
    assert control.json("federation", "status")["federation"]["spec"]["epoch"] == 1
    revoked = control.json("agents", "revoke", "agent-9", "--reason", "lost in a train")
    assert (revoked["epoch"], revoked["adoption"]["adopted"]) == (3, True)
    assert control.refused("agents", "token", "agent-9", "--out", str(file)) == (1, "agent_revoked")
    assert control.json("keys", "retire", "2")["state"] == "retired"
    assert control.refused("keys", "retire", "3") == (1, "wrong_epoch")
    actions = [record["action"] for record in control.json("keys", "audit", "--limit", "1000")]
    assert actions.count("rotate") >= 1
    assert "revoke" in actions
    assert "epoch" in control.run("keys", "epochs").out


def test_services_that_are_away_are_3(control: Control) -> None:
    for name, command in ((AGGREGATOR, ("federation", "list")), (KEYMANAGER, ("keys", "epochs"))):
        control.crew.workers[name].send(signal.SIGTERM)
        control.crew.workers[name].process.wait(timeout=60)
        assert control.refused(*command) == (3, "peer_unreachable")
