from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import structlog
from typer.testing import CliRunner

from services.common.enrolment import Enrolment
from services.common.identity import Role
from services.keymanager.__main__ import app
from support.keymanager import FEDERATION

BANNER = "federation: clinics\nlisten: 127.0.0.1:7441\nenrolment_listen: 127.0.0.1:7442\n"


@pytest.fixture(autouse=True)
def _quiet_logs() -> Iterator[None]:
    yield
    structlog.reset_defaults()


class Cli:
    def __init__(self, config: Path) -> None:
        self._config = config
        self._runner = CliRunner()

    def run(self, command: str, *arguments: str, code: int = 0) -> str:
        result = self._runner.invoke(app, [command, "--config", str(self._config), *arguments])
        assert result.exit_code == code, result.output
        return result.output if code else result.stdout

    def json(self, command: str, *arguments: str) -> Any:
        return json.loads(self.run(command, *arguments, "--json"))


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    config = tmp_path / "keymanager.yaml"
    config.write_text(BANNER)
    found = Cli(config)
    found.run("init")
    return found


def test_init_is_safe_to_repeat(cli: Cli, tmp_path: Path) -> None:
    kek = (tmp_path / "keymanager.kek").read_bytes()
    assert cli.json("init")["epoch"] == 1
    assert (tmp_path / "keymanager.kek").read_bytes() == kek
    assert (tmp_path / "keymanager.kek").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "keymanager-state").stat().st_mode & 0o777 == 0o700
    assert [epoch["number"] for epoch in cli.json("epochs")] == [1]


def test_commands_before_init_say_so(tmp_path: Path) -> None:
    config = tmp_path / "keymanager.yaml"
    config.write_text(BANNER)
    output = Cli(config).run("epochs", code=1)
    assert "invalid_configuration" in output
    assert "shelora-keymanager init" in output


def test_token_writes_the_enrolment_file(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "agent-1.json"
    shown = cli.run("token", "--role", "agent", "--name", "agent-1", "--out", str(out))
    enrolment = Enrolment.load(out)
    assert (enrolment.federation, enrolment.role, enrolment.name) == (FEDERATION, Role.AGENT, "agent-1")
    assert (enrolment.keymanager, enrolment.enrolment) == ("127.0.0.1:7441", "127.0.0.1:7442")
    assert out.stat().st_mode & 0o777 == 0o600
    assert enrolment.token not in shown
    printed = json.loads(cli.run("token", "--role", "aggregator", "--name", "main", "--server-name", "localhost"))
    assert printed["role"] == "aggregator"
    assert "token" in printed
    # An aggregator is never told of the port that hands out secrets.
    assert (printed["keymanager"], printed["enrolment"]) == ("127.0.0.1:7444", "127.0.0.1:7442")


def test_token_replaces_a_file_as_a_whole(cli: Cli, tmp_path: Path) -> None:
    out, held = tmp_path / "agent-1.json", tmp_path / "held.json"
    cli.run("token", "--role", "agent", "--name", "agent-1", "--out", str(out))
    out.chmod(0o644)
    held.hardlink_to(out)
    before = Enrolment.load(out)
    cli.run("token", "--role", "agent", "--name", "agent-1", "--out", str(out))
    assert Enrolment.load(out).token != before.token
    assert out.stat().st_mode & 0o777 == 0o600
    # Whoever has the old file open reads on in the old one.
    assert Enrolment.load(held) == before
    assert [path.name for path in tmp_path.glob("*agent-1*")] == ["agent-1.json"]


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        ("absent/agent-1.json", "got no folder "),
        ("keymanager.yaml/agent-1.json", "got no folder "),
        ("keymanager-state", "got a folder of that name"),
    ],
)
def test_token_is_not_made_for_a_file_that_cannot_be_written(
    cli: Cli, tmp_path: Path, place: str, problem: str
) -> None:
    output = cli.run("token", "--role", "agent", "--name", "agent-1", "--out", str(tmp_path / place), code=1)
    assert "invalid_configuration" in output
    assert f"enrolment file {tmp_path / place}: expected a place to write, {problem}" in output
    assert not (tmp_path / "absent").exists()
    assert [record["action"] for record in cli.json("audit")] == ["rotate"]


def test_token_is_not_made_without_an_address_that_members_reach(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "keymanager.yaml").write_text(BANNER + "membership_listen: 0.0.0.0:7444\n")
    arguments = ("--role", "aggregator", "--name", "main", "--server-name", "localhost")
    assert "advertise_membership: expected an address" in cli.run("token", *arguments, code=1)
    cli.run("token", "--role", "agent", "--name", "agent-1")
    actions = [(record["action"], record["outcome"]) for record in cli.json("audit")]
    assert actions == [("rotate", "granted"), ("denied", "invalid_configuration"), ("token", "granted")]


def test_token_refuses_what_cannot_work(cli: Cli) -> None:
    assert "invalid_identifier" in cli.run("token", "--role", "agent", "--name", "Agent 1", code=1)
    assert "--server-name localhost" in cli.run("token", "--role", "aggregator", "--name", "main", code=1)
    assert "'banana' is not one of" in cli.run("token", "--role", "banana", "--name", "main", code=2)


def test_the_life_of_an_epoch_on_the_command_line(cli: Cli) -> None:
    assert cli.json("rotate", "--reason", "test")["number"] == 2
    assert cli.json("retire", "1")["state"] == "retired"
    assert "wrong_epoch" in cli.run("retire", "2", code=1)
    assert "unknown_agent" in cli.run("revoke", "--role", "agent", "--name", "agent-1", "--reason", "lost", code=1)
    cli.run("token", "--role", "agent", "--name", "agent-1")
    assert cli.json("revoke", "--role", "agent", "--name", "agent-1", "--reason", "lost")["number"] == 3
    assert [one["identity"] for one in cli.json("revocations")] == ["spiffe://clinics/agent/agent-1"]
    assert "spiffe://clinics/agent/agent-1" in cli.run("revocations")
    assert "superseded" in cli.run("epochs")
    assert cli.json("reseal") == {"epochs_changed": 0}


def test_audit_shows_and_verifies(cli: Cli, tmp_path: Path) -> None:
    cli.run("retire", "1", code=1)
    records = cli.json("audit")
    assert [record["outcome"] for record in records] == ["granted", "wrong_epoch"]
    assert [record["actor"] for record in records] == ["local", "local"]
    assert "retire epoch 1" in cli.run("audit", "--after", "1", "--limit", "1")
    assert cli.json("audit", "--verify") == {"intact": True, "records": 2}
    engine = sa.create_engine(f"sqlite:///{tmp_path}/keymanager-state/keymanager.db")
    with engine.begin() as connection:
        connection.execute(sa.text("DROP TRIGGER audit_no_update"))
        connection.execute(sa.text("UPDATE audit SET outcome = 'granted'"))
    engine.dispose()
    assert "record 2: expected digest" in cli.run("audit", "--verify", code=1)
