from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from services.operators.cli import app
from services.operators.commands.frame import EXIT_REFUSED, EXIT_STOPPED, EXIT_UNREACHABLE, exit_code
from shelora.errors import (
    Draining,
    FederationEnded,
    InvalidConfiguration,
    PeerUnreachable,
    RoleDenied,
    UnknownFederation,
)

runner = CliRunner()
COMMANDS = {
    "federation": ["create", "start", "status", "stop", "adopt", "list", "rounds"],
    "agents": ["list", "token", "revoke"],
    "keys": ["epochs", "rotate", "retire", "audit"],
    "plan": ["explain"],
}


def test_help_names_every_group_and_the_exit_codes() -> None:
    found = runner.invoke(app, ["--help"])
    assert found.exit_code == 0
    for word in (*COMMANDS, "audit", "demo", "3 a service cannot be reached", "--profile", "--json"):
        assert word in " ".join(found.output.split()), word


@pytest.mark.parametrize(("group", "command"), [(group, name) for group, names in COMMANDS.items() for name in names])
def test_every_command_takes_profile_and_json(group, command) -> None:
    found = runner.invoke(app, [group, command, "--help"])
    assert found.exit_code == 0
    assert "--json" in found.output
    assert "--profile" in found.output


def test_version() -> None:
    found = runner.invoke(app, ["--version"])
    assert found.exit_code == 0
    assert found.output.startswith("shelora 0")


@pytest.mark.usefixtures("no_profile")
def test_a_missing_profile_is_wrong_usage() -> None:
    found = runner.invoke(app, ["federation", "status"])
    assert found.exit_code == 2
    assert "operator.yaml" in found.output


@pytest.mark.usefixtures("no_profile")
def test_the_environment_names_a_profile_and_the_option_wins(monkeypatch) -> None:
    monkeypatch.setenv("SHELORA_PROFILE", "from-environment.yaml")
    assert "from-environment.yaml" in runner.invoke(app, ["agents", "list"]).output
    for arguments in (["--profile", "own.yaml", "agents", "list"], ["agents", "list", "--profile", "own.yaml"]):
        output = runner.invoke(app, arguments).output
        assert "own.yaml" in output
        assert "environment.yaml" not in output


@pytest.mark.parametrize(
    "arguments",
    [
        ["federation", "create"],
        ["federation", "create", "--rounds", "3", "--agents", "1"],
        ["federation", "create", "--rounds", "3", "--agents", "2", "--quorum", "3"],
        ["federation", "unknown"],
        ["agents", "token", "agent-1"],
        ["keys", "retire", "0"],
        ["plan", "explain", "--budgets", "full"],
        ["plan", "explain", "--ranks", "4", "--model-shapes", "1*8x8", "--packing", "loose"],
        ["plan", "explain", "--ranks", "x", "--model-shapes", "1*8x8"],
        ["plan", "explain", "--ranks", "4", "--model-shapes", "1*8"],
        ["plan", "explain", "--ranks", "4", "--budgets", "lots", "--model-shapes", "1*8x8"],
        ["plan", "explain", "--agents", "4"],
    ],
)
@pytest.mark.usefixtures("no_profile")
def test_wrong_usage_is_2(arguments) -> None:
    assert runner.invoke(app, arguments).exit_code == 2


@pytest.mark.usefixtures("no_profile")
def test_plan_explain_needs_no_service_for_an_imagined_model() -> None:
    arguments = ["plan", "explain", "--ranks", "4,4,4,4", "--budgets", "full,10%", "--model-shapes", "104*3200x3200"]
    arguments += ["--allow-unsafe"]
    found = runner.invoke(app, [*arguments, "--json"])
    assert found.exit_code == 0
    agents = json.loads(found.output)["agents"]
    assert [agent["blocks"] for agent in agents] == [1300, 130, 1300, 130]
    before = runner.invoke(app, ["--json", *arguments])
    assert json.loads(before.output)["agents"] == agents
    dense = runner.invoke(app, [*arguments, "--packing", "dense", "--json"])
    assert [agent["blocks"] for agent in json.loads(dense.output)["agents"]] == [650, 65, 650, 65]
    table = runner.invoke(app, arguments)
    assert table.exit_code == 0
    assert "1,300" in table.output
    assert "basis rows 16" in table.output


@pytest.mark.usefixtures("no_profile")
def test_an_impossible_rank_is_refused_with_its_code() -> None:
    found = runner.invoke(app, ["plan", "explain", "--ranks", "9", "--model-shapes", "1*8x8", "--json"])
    assert found.exit_code == EXIT_REFUSED
    assert json.loads(found.stderr)["error"]["code"] == "rank_mismatch"


@pytest.mark.usefixtures("no_profile")
def test_unsafe_settings_are_shown_and_refused_unless_allowed() -> None:
    wanted = [
        "plan",
        "explain",
        "--ranks",
        "8",
        "--agents",
        "4",
        "--budgets",
        "full,25%",
        "--model-shapes",
        "19*384x384",
    ]
    refused = runner.invoke(app, [*wanted, "--json"])
    assert refused.exit_code == EXIT_REFUSED
    assert json.loads(refused.stdout)["unsafe"] == ["agent-2", "agent-4"]
    error = json.loads(refused.stderr)["error"]
    assert error["code"] == "unsafe_plan"
    assert "only the secret order" in error["message"]
    assert "--allow-unsafe" in error["hint"]
    shown = runner.invoke(app, wanted)
    assert shown.exit_code == EXIT_REFUSED
    assert "agent-2, agent-4: unsafe" in shown.stdout
    assert "unsafe_plan" in shown.stderr
    allowed = runner.invoke(app, [*wanted, "--allow-unsafe"])
    assert (allowed.exit_code, allowed.stderr) == (0, "")
    assert allowed.stdout == shown.stdout
    assert runner.invoke(app, ["plan", "explain", "--ranks", "8,8,8", "--model-shapes", "19*384x384"]).exit_code == 0


@pytest.mark.usefixtures("no_profile")
@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--packing", "dense", "--agents", "4097"], "invalid_plan"),
        (["--basis-cap", "3"], "invalid_plan"),
        (["--ring-dimension", "2048"], "invalid_configuration"),
        (["--payload-limit", "1000"], "payload_too_large"),
        (["--budgets", "10%", "--agents", "4096"], "invalid_plan"),
        (["--budgets", "10%", "--negotiation", "none"], "invalid_plan"),
    ],
)
def test_impossible_settings_are_refused_whatever_is_allowed(options, code) -> None:
    wanted = [
        "plan",
        "explain",
        "--ranks",
        "4",
        "--model-shapes",
        "2*64x48,dense*9",
        *options,
        "--allow-unsafe",
        "--json",
    ]
    found = runner.invoke(app, wanted)
    assert found.exit_code == EXIT_REFUSED
    assert found.stdout == ""
    assert json.loads(found.stderr)["error"]["code"] == code


@pytest.mark.usefixtures("no_profile")
def test_typed_speeds_and_parameters_count() -> None:
    wanted = ["plan", "explain", "--ranks", "4,4,4", "--model-shapes", "2*64x48", "--json"]
    speeds = ["--encrypt-rate", "8192", "--upload-rate", "1000", "--download-rate", "2000"]
    found = json.loads(runner.invoke(app, [*wanted, *speeds, "--ring-dimension", "8192"]).stdout)
    assert found["security"]["ring_dimension"] == 8192
    agent = found["agents"][0]
    assert agent["encrypt_s"] == 1.0
    assert agent["upload_s"] == agent["up_bytes"] / 1000
    assert agent["download_s"] == agent["down_bytes"] / 2000


def test_a_service_that_is_not_there_is_3(tmp_path: Path) -> None:
    from services.common.enrolment import Enrolment
    from services.common.identity import Role

    enrolment = Enrolment("demo", Role.OPERATOR, "ann", "t" * 20, "no certificate", "127.0.0.1:9", "127.0.0.1:9")
    enrolment.save(tmp_path / "enrolment.json")
    (tmp_path / "operator.yaml").write_text(
        "federation: demo\naggregator: 127.0.0.1:9\nidentity_dir: identity\nenrolment_file: enrolment.json\n"
    )
    found = runner.invoke(app, ["federation", "list", "--profile", str(tmp_path / "operator.yaml")])
    assert found.exit_code == EXIT_REFUSED
    assert "invalid_configuration" in found.stderr
    assert "what to do" in found.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (FederationEnded("x"), EXIT_STOPPED),
        (PeerUnreachable("x"), EXIT_UNREACHABLE),
        (Draining("x"), EXIT_UNREACHABLE),
        (RoleDenied("x"), EXIT_REFUSED),
        (UnknownFederation("x"), EXIT_REFUSED),
        (InvalidConfiguration("x"), EXIT_REFUSED),
    ],
)
def test_errors_have_their_exit_codes(error, code) -> None:
    assert exit_code(error) == code


def test_demo_shows_its_own_help_and_refuses_what_it_cannot_use(tmp_path) -> None:
    found = runner.invoke(app, ["demo", "--help"])
    assert found.exit_code == 0
    assert "--budgets" in found.output
    refused = runner.invoke(app, ["demo", "--data", "none.jsonl", "--out", str(tmp_path / "demo")])
    assert refused.exit_code == 2
    assert "none.jsonl" in refused.output
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "file").write_text("mine")
    refused = runner.invoke(app, ["demo", "--out", str(foreign)])
    assert refused.exit_code == 2
    assert (foreign / "file").read_text() == "mine"
