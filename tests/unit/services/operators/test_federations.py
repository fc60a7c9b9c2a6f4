"""`shelora federation create` and `start` check the plan first; the services are stand-ins."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from services.common.keymanager_client import FetchedEpoch
from services.operators.cli import app
from services.operators.commands import federations, frame
from services.operators.domain import Federation, FederationSpec, RegisteredAgent, Round
from services.operators.profile import OperatorProfile
from shelora.rounds.phases import FederationState
from support.operators import PARAMETERS, make_federation, make_member, make_round

PROFILE = "federation: demo\naggregator: 127.0.0.1:9\nkeymanager: 127.0.0.1:8\nidentity_dir: identity\n"


def agent(name: str, k: int = 32) -> RegisteredAgent:
    return RegisteredAgent(name, 4, (k, k), "full" if k == 32 else "25%", "0.1.0", 0, True, None, 480)


@dataclass
class Services:
    """A session with nobody behind it; agents come one a look."""

    profile: OperatorProfile | None = None
    coming: list[RegisteredAgent] = field(default_factory=list)
    present: list[RegisteredAgent] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    found: Federation = field(default_factory=lambda: make_federation(FederationState.CREATED, planned=False))
    past: list[Round] = field(default_factory=list)

    @property
    def federations(self) -> Services:
        return self

    async def get(self, name: str) -> Federation:
        return self.found

    async def agents(self, name: str) -> list[RegisteredAgent]:
        if self.coming:
            self.present.append(self.coming.pop(0))
        return self.present

    async def rounds(self, name: str) -> list[Round]:
        return self.past

    async def epoch(self, number: int) -> FetchedEpoch:
        return FetchedEpoch("demo", 1, "current", PARAMETERS, b"", b"", 0)

    async def create(self, spec: FederationSpec) -> Federation:
        self.done.append("created")
        return replace(self.found, spec=spec)

    async def start(self, name: str, more_rounds: int) -> Federation:
        self.done.append("started")
        return replace(self.found, state=FederationState.GATHERING)


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Services:
    made = Services()

    @contextlib.asynccontextmanager
    async def connect(profile: OperatorProfile, clock: object) -> AsyncIterator[Services]:
        made.profile = profile
        yield made

    monkeypatch.setattr(frame, "connect", connect)
    monkeypatch.setattr(federations, "_LOOK_AGAIN_S", 0.0)
    (tmp_path / "operator.yaml").write_text(PROFILE)
    monkeypatch.setenv("SHELORA_PROFILE", str(tmp_path / "operator.yaml"))
    return made


def run(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, list(arguments))
    return done.exit_code, done.stdout, done.stderr


def test_a_safe_federation_starts_with_its_plan_in_a_line(services) -> None:
    services.coming = [agent("a"), agent("b")]
    services.present = [agent("c")]
    code, out, _ = run("federation", "start")
    assert (code, services.done) == (0, ["started"])
    assert "plan: 2 agents, per round and agent" in " ".join(out.split())
    assert "gathering" in out


def test_an_unsafe_one_is_refused_unless_that_is_allowed(services) -> None:
    services.present = [agent("a"), agent("b", k=8)]
    code, out, err = run("federation", "start", "--json")
    assert (code, out, services.done) == (1, "", [])
    assert json.loads(err)["error"]["code"] == "unsafe_plan"
    code, out, _ = run("federation", "start", "--allow-unsafe", "--json")
    assert (code, services.done) == (0, ["started"])
    found = json.loads(out)
    assert found["state"] == "gathering"
    assert found["preflight"]["explanation"]["unsafe"] == ["b"]
    assert "unsafe for b" in found["preflight"]["summary"]


def test_status_names_whoever_came_later_with_unsafe_settings(services) -> None:
    services.present = [agent("a"), agent("b", k=8)]
    code, out, _ = run("federation", "status")
    assert code == 0
    assert "unsafe settings: b; see shelora plan explain" in out
    assert json.loads(run("federation", "status", "--json")[1])["unsafe"] == ["b"]
    services.present = [agent("a")]
    assert "unsafe" not in run("federation", "status")[1]


def test_start_can_wait_for_all_agents(services) -> None:
    services.coming = [agent("a"), agent("b", k=8)]
    assert run("federation", "start", "--wait-s", "60")[0] == 1
    assert services.present == [agent("a"), agent("b", k=8)]
    assert services.done == []


def test_an_impossible_one_is_refused_whatever_is_allowed(services) -> None:
    services.found = replace(services.found, spec=replace(services.found.spec, basis_cap=3))
    services.present = [agent("a"), agent("b")]
    code, _, err = run("federation", "start", "--allow-unsafe", "--json")
    assert (code, json.loads(err)["error"]["code"], services.done) == (1, "invalid_plan", [])


def test_impossible_terms_are_refused_before_anything_is_created(services) -> None:
    wanted = ["federation", "create", "--rounds", "1", "--json", "--agents"]
    for options in (["4097", "--packing", "dense"], ["4096", "--negotiation", "encrypted"]):
        code, _, err = run(*wanted, *options)
        assert (code, json.loads(err)["error"]["code"], services.done) == (1, "invalid_plan", [])
    assert run(*wanted, "4096")[0] == 0
    assert services.done == ["created"]


def test_plan_explain_uses_what_agents_measured_unless_speeds_are_typed(services) -> None:
    services.present = [agent("agent-1"), agent("agent-2")]
    services.past = [make_round(1, make_member("agent-1", 4, 32, seconds_he_encrypt=2.0))]
    code, out, _ = run("plan", "explain", "--json")
    found = json.loads(out)["agents"]
    assert code == 0
    assert [one["measured"] for one in found] == [True, False]
    assert found[0]["encrypt_s"] == 2.0
    code, out, _ = run("plan", "explain", "--encrypt-rate", "4096", "--json")
    assert [one["encrypt_s"] for one in json.loads(out)["agents"]] == [1.0, 1.0]


def test_plan_explain_imagines_agents_on_the_federation_s_model(services) -> None:
    code, out, _ = run("plan", "explain", "--ranks", "4,8", "--basis-cap", "10", "--json")
    found = json.loads(out)
    assert (code, found["modules"], found["cap"]) == (0, 2, 10)


def test_audit_judges_registered_agents(services) -> None:
    assert json.loads(run("audit", "--json")[2])["error"]["code"] == "invalid_plan"
    services.present = [agent("a"), agent("b", k=8)]
    code, out, _ = run("audit", "--json")
    assert (code, [one["level"] for one in json.loads(out)]) == (0, ["caution", "unsafe"])
