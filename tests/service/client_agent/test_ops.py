"""An agent's health, readiness and metrics over HTTP: off unless configured, and true at every moment."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from services.client_agent.domain import Activity
from support.deployment import Deployment, until, until_seen

PATIENCE_S = 240.0
"""The machine may be busy while a process loads its libraries."""


async def get(port: Any, path: str) -> httpx.Response:
    async with httpx.AsyncClient(trust_env=False) as client:
        return await client.get(f"http://127.0.0.1:{port}/{path}", timeout=10)


async def test_readiness_follows_the_connection(deployment: Deployment) -> None:
    await deployment.enrol("agent-0")
    running = await deployment.start_agent("agent-0", 0, ops_listen="127.0.0.1:0", exit_when_finished=False)
    port, board = running.ports["ops"], running.agent.board
    await until(lambda: board.status.activity is Activity.RECONNECTING, "the federation is missing")
    answer = await get(port, "readyz")
    assert answer.status_code == 503
    assert "federation" in answer.json()["reason"]
    assert (await get(port, "healthz")).status_code == 200
    await deployment.create(target_agents=2)
    await until(lambda: board.connected, "agent-0 is registered")
    answer = await get(port, "readyz")
    assert (answer.status_code, answer.json()["activity"], answer.json()["paused"]) == (200, "waiting", False)
    assert 'shelora_agent_errors_total{code="unknown_federation"}' in (await get(port, "metrics")).text

    await deployment.stop_aggregator()
    await until(lambda: not board.connected, "the view stream is gone")
    answer = await get(port, "readyz")
    assert answer.status_code == 503
    assert answer.json()["reason"] == answer.json()["last_error"] != ""
    await deployment.start_aggregator()

    async def reconnected() -> bool:
        return (await get(port, "readyz")).status_code == 200

    await until_seen(reconnected, "agent-0 is back")
    assert "shelora_agent_reconnects_total 1.0" in (await get(port, "metrics")).text


async def test_nothing_listens_unless_configured(deployment: Deployment) -> None:
    await deployment.enrol("agent-0")
    running = await deployment.start_agent("agent-0", 0)
    assert set(running.ports) == {"control", "control_port"}


def write_config(deployment: Deployment, ops_listen: str) -> Path:
    config = deployment.config("agent-0", 0, ops_listen=ops_listen, keymanager="127.0.0.1:1")
    path = deployment.folder / "agent.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_none=True)))
    return path


async def start(config: Path, *options: str) -> asyncio.subprocess.Process:
    command = (sys.executable, "-m", "services.client_agent.cli", "run", "--config", str(config), *options)
    return await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )


async def test_a_port_in_use_is_told_at_the_start(deployment: Deployment) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        process = await start(write_config(deployment, address))
        output, _ = await asyncio.wait_for(process.communicate(), PATIENCE_S)
    assert process.returncode == 1
    text = " ".join(output.decode().split())
    assert f"invalid_configuration: HTTP server: expected a free address, got {address}" in text
    assert "what to do: stop the process that uses it" in text


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_a_process_that_cannot_enrol_is_alive_not_ready_and_ends_at_the_signal(deployment: Deployment) -> None:
    """The ready file names the ops port while the agent still waits for a key manager and for its training library."""
    await deployment.enrol("agent-0")
    enrolment = json.loads((deployment.folder / "agent-0.json").read_text())
    enrolment["enrolment"] = "127.0.0.1:1"
    (deployment.folder / "agent-0.json").write_text(json.dumps(enrolment))
    ready_file = deployment.folder / "ready.json"
    process = await start(write_config(deployment, "127.0.0.1:0"), "--ready-file", str(ready_file))
    try:
        await until(lambda: ready_file.exists() or process.returncode is not None, "the process serves", PATIENCE_S)
        port = json.loads(ready_file.read_text())["ops"]
        assert (await get(port, "healthz")).status_code == 200
        answer = await get(port, "readyz")
        assert (answer.status_code, answer.json()["ready"], answer.json()["activity"]) == (503, False, "preparing")

        async def told() -> bool:
            return "unavailable" in (await get(port, "readyz")).json()["reason"]

        await until_seen(told, "the key manager is missed", PATIENCE_S)
        assert 'shelora_agent_errors_total{code="peer_unreachable"}' in (await get(port, "metrics")).text
        assert 'shelora_agent_activity{activity="preparing"} 1.0' in (await get(port, "metrics")).text
        os.kill(process.pid, signal.SIGTERM)
        output, _ = await asyncio.wait_for(process.communicate(), PATIENCE_S)
        assert process.returncode == 0, output.decode()
        assert not ready_file.exists()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
