"""Health, metrics, Prometheus and the dashboard, against real services after real rounds.

The parts that need a Prometheus run with the Debian package `prometheus` and are skipped without it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from shelora.errors import RoleDenied
from support.deployment import Deployment, deployed, until, until_seen
from support.keymanager import FEDERATION
from support.prometheus import CONFIGURATION, ROOT, Prometheus, installed, running_prometheus

GRAFANA: Final = ROOT / "deploy/monitoring/grafana"
ROUNDS: Final = 2
AGENTS: Final = ("agent-0", "agent-1")

MACROS: Final = {"$__rate_interval": "2m", "$__range": "10m", "$federation": FEDERATION, "$agent": ".*"}
"""What Grafana would put in."""

MAY_BE_EMPTY: Final = {"Agents' errors by code", "Refused payloads", "Firing alerts"}
"""Panels about what does not go wrong here."""

PROMETHEUS_OWN: Final = {"up", "ALERTS"}

needs_prometheus = pytest.mark.skipif(not installed(), reason="install the Debian package prometheus")


@dataclass(frozen=True)
class Scene:
    """Services after the last round, what they export, and a Prometheus that has watched them if there is one."""

    ops: dict[str, list[str]]
    exported: set[str]
    prometheus: Prometheus | None


@pytest.fixture(scope="module")
async def scene(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    folder = tmp_path_factory.mktemp("monitoring")
    async with deployed(folder) as deployment, contextlib.AsyncExitStack() as stack:
        for number, name in enumerate(AGENTS):
            await deployment.enrol(name)
            await deployment.start_agent(name, number, ops_listen="127.0.0.1:0", exit_when_finished=False)
        ops = ops_addresses(deployment)
        prometheus = None
        if installed():
            prometheus = await stack.enter_async_context(running_prometheus(folder, ops))
        with pytest.raises(RoleDenied):
            await deployment.operator.get("nowhere")
        await deployment.create(rounds=ROUNDS, target_agents=len(AGENTS))
        boards = [one.agent.board for one in deployment.agents.values()]
        await until(lambda: all(board.status.applied_round == ROUNDS for board in boards), "all rounds are applied")

        async def shown() -> bool:
            return f'shelora_federation_published_rounds{{federation="{FEDERATION}"}} {ROUNDS}.0' in await metrics(
                ops["aggregator"][0]
            )

        await until_seen(shown, "the aggregator's figures are fresh")
        if prometheus is not None:
            await until_seen(functools.partial(has_seen_all, prometheus), "Prometheus has seen the last round")
        exported = set(
            itertools.chain(*[names_in(await metrics(address)) for address in itertools.chain(*ops.values())])
        )
        yield Scene(ops, exported, prometheus)


async def has_seen_all(prometheus: Prometheus) -> bool:
    published = await prometheus.evaluate("shelora_federation_published_rounds")
    applied = await prometheus.evaluate("shelora_agent_applied_round")
    return published == [ROUNDS] and applied == [ROUNDS] * len(AGENTS)


def ops_addresses(deployment: Deployment) -> dict[str, list[str]]:
    """Addresses by the file in prometheus/targets that names them."""
    return {
        "keymanager": [f"127.0.0.1:{deployment.keymanager.ports['ops']}"],
        "aggregator": [f"127.0.0.1:{deployment.aggregator_ops_port}"],
        "agents": [f"127.0.0.1:{one.ports['ops']}" for one in deployment.agents.values()],
    }


async def metrics(address: str) -> str:
    async with httpx.AsyncClient(trust_env=False) as client:
        return (await client.get(f"http://{address}/metrics", timeout=10)).raise_for_status().text


def names_in(text: str) -> Iterator[str]:
    """Names of time series, those without a sample so far included."""
    endings = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "summary": ("_sum", "_count")}
    for family in text_string_to_metric_families(text):
        yield from (family.name + ending for ending in endings.get(family.type, ("",)))


def dashboard() -> dict[str, Any]:
    return dict(json.loads((GRAFANA / "dashboards/shelora.json").read_text()))


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def panel_expressions() -> list[tuple[str, str]]:
    """Title and expression, as Grafana would send it."""
    found = []
    for panel in panels():
        for target in panel["targets"]:
            expression = target["expr"]
            for macro, value in MACROS.items():
                expression = expression.replace(macro, value)
            found.append((panel["title"], expression))
    return found


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((CONFIGURATION / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def metrics_in(expression: str) -> set[str]:
    """Names of metrics in an expression: what is neither label, text, function, operator nor number."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\b(by|on)\s*\([^)]*\)", " ", expression)
    words = set(re.findall(r"[A-Za-z_:][\w:]*(?!\s*\()\b(?!\s*\()", bare))
    return words - {"and", "or", "unless"}


def test_names_of_metrics_are_found_in_expressions():
    expression = 'sum by (le, step) (rate(a_total{x="b"}[5m])) / 2 and on (c) max(d:e == 1) or time() - f'
    assert metrics_in(expression) == {"a_total", "d:e", "f"}


def test_panels_have_places_of_their_own():
    found = dashboard()["panels"]
    identifiers = [panel["id"] for panel in found]
    assert len(set(identifiers)) == len(identifiers)
    taken: dict[tuple[int, int], str] = {}
    for panel in found:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for cell in itertools.product(
            range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        ):
            assert cell not in taken, f"{panel['title']} lies over {taken[cell]}"
            taken[cell] = panel["title"]


def test_panels_name_unit_data_source_and_known_variables():
    variables = {variable["name"]: variable for variable in dashboard()["templating"]["list"]}
    for panel in panels():
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["targets"], panel["title"]
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references)
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            used = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval", "__range"}
            assert used <= set(variables), panel["title"]
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())["datasources"]
    assert variables["datasource"]["current"]["value"] == source["uid"]
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/shelora.yml").read_text())["providers"]
    assert provider["options"]["path"] == "/var/lib/grafana/dashboards"


def test_alerts_say_what_and_how_bad():
    names = [rule["alert"] for rule in alerts()]
    assert len(set(names)) == len(names)
    for rule in alerts():
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert set(rule["annotations"]) == {"summary", "description"}


async def test_everything_alive_and_ready(scene: Scene):
    async with httpx.AsyncClient(trust_env=False) as client:
        for address in itertools.chain(*scene.ops.values()):
            for path in ("healthz", "readyz"):
                answer = await client.get(f"http://{address}/{path}", timeout=10)
                assert answer.status_code == 200, answer.text


async def test_every_metric_that_is_shown_or_watched_is_exported(scene: Scene):
    known = scene.exported | PROMETHEUS_OWN
    for about, expression in [*panel_expressions(), *((rule["alert"], rule["expr"]) for rule in alerts())]:
        used = metrics_in(expression)
        assert used, f"{about}: no metric in {expression}"
        assert used <= known, f"{about}: {used - known} is exported by nobody"


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60)


@needs_prometheus
def test_the_configuration_is_accepted():
    checked = promtool("check", "config", CONFIGURATION / "prometheus.yml")
    assert checked.returncode == 0, checked.stdout + checked.stderr


@needs_prometheus
def test_alerts_fire_on_what_they_are_about(tmp_path: Path):
    shutil.copytree(CONFIGURATION, tmp_path / "deploy/monitoring/prometheus")
    cases = tmp_path / "tests/deploy/alerts_test.yml"
    cases.parent.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("alerts_test.yml"), cases)
    tested = promtool("test", "rules", cases)
    assert tested.returncode == 0, tested.stdout + tested.stderr
    # A rule that is not among the cases would pass for want of a test.
    assert {rule["alert"] for rule in alerts()} == set(re.findall(r'alertname="(\w+)"', cases.read_text()))


@needs_prometheus
async def test_prometheus_scrapes_every_service(scene: Scene):
    assert scene.prometheus is not None
    expected = sum(len(addresses) for addresses in scene.ops.values())
    # One scrape may take too long on a busy machine.
    assert await scene.prometheus.evaluate("max_over_time(up[5m])") == [1.0] * expected
    assert await scene.prometheus.evaluate("count(count by (job) (up))") == [3.0]
    labels = '{outcome="published"}'
    ended = await scene.prometheus.evaluate(f"shelora_federation_ended_rounds_total{labels}")
    assert ended == [ROUNDS]


@needs_prometheus
async def test_every_panel_evaluates_and_shows_the_rounds(scene: Scene):
    assert scene.prometheus is not None
    empty = []
    for title, expression in panel_expressions():
        values = await scene.prometheus.evaluate(expression)
        if not any(math.isfinite(value) for value in values) and title not in MAY_BE_EMPTY:
            empty.append(f"{title}: {expression}")
    assert not empty, "\n".join(empty)


@needs_prometheus
async def test_every_alert_evaluates_and_none_fires(scene: Scene):
    assert scene.prometheus is not None
    for rule in alerts():
        await scene.prometheus.evaluate(rule["expr"])
    groups = (await scene.prometheus.ask("rules"))["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) == len(alerts())
    for rule in rules:
        assert rule["health"] == "ok", rule
        assert rule["state"] != "firing", rule  # a nearly full disk of this machine may be pending
