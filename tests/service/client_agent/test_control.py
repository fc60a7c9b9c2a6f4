"""The control interface over its Unix socket, and the command line that talks to it."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import sys
from pathlib import Path

import pytest

from services.client_agent.cli import EXIT_REFUSED, EXIT_UNREACHABLE
from services.client_agent.client import ControlClient
from services.client_agent.domain import Activity, Status
from services.common.channel import open_channel
from shelora.errors import InvalidConfiguration, PeerUnreachable, UnknownRound
from shelora.rounds import RoundPhase
from support.deployment import until, until_seen
from support.keymanager import FEDERATION


async def begin(*arguments: str) -> asyncio.subprocess.Process:
    """Start the command line in a process of its own: this one's output belongs to the agents that run in it."""
    program = (sys.executable, "-m", "services.client_agent.cli")
    return await asyncio.create_subprocess_exec(
        *program, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )


async def command(*arguments: str) -> tuple[int, str]:
    """Exit code and output of the command line."""
    process = await begin(*arguments)
    output, _ = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode is not None
    return process.returncode, output.decode()


async def watched(agent: ControlClient, seen: list[Status]) -> None:
    async for status in agent.watch():
        seen.append(status)


async def test_a_fleet_manager_steers_an_agent(deployment, tmp_path):
    for number in range(2):
        await deployment.enrol(f"agent-{number}")
        await deployment.start_agent(f"agent-{number}", number)
    running = deployment.agents["agent-0"]
    socket = running.agent.config.control_address.removeprefix("unix:")
    assert stat.S_IMODE(os.stat(socket).st_mode) == 0o600
    async with running.control() as control:
        seen: list[Status] = []
        watching = asyncio.ensure_future(watched(control, seen))
        paused = await control.pause()
        assert paused.paused
        with pytest.raises(UnknownRound, match="saved rounds: none"):
            await control.export_adapter(0, tmp_path / "early")
        await deployment.create(target_agents=2, rounds=1)

        async def other_uploaded() -> bool:
            federation = await deployment.operator.get(FEDERATION)
            return federation.round is not None and federation.round.phase is RoundPhase.FACTORS

        await until_seen(other_uploaded, "agent-1 has uploaded")
        await until(lambda: running.agent.board.status.activity is Activity.IDLE, "agent-0 is idle")
        status = await control.status()
        assert (status.name, status.federation, status.paused) == ("agent-0", FEDERATION, True)
        assert (status.activity, status.round, status.rounds, status.applied_round) == (Activity.IDLE, 1, 1, 0)
        assert not (await control.start()).paused
        await deployment.finish()
        await asyncio.wait_for(watching, 30)
        activities = {one.activity for one in seen}
        assert activities >= {Activity.TRAINING, Activity.WAITING, Activity.ENDED}
        assert seen[-1].activity is Activity.ENDED
        status = await control.status()
        assert status.applied_round == 1
        assert status.metrics["bytes_up"] > 0
        folder = tmp_path / "adapter"
        assert await control.export_adapter(0, folder) == (folder, 1)
        assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in folder.iterdir()}
        with pytest.raises(InvalidConfiguration, match="not empty"):
            await control.export_adapter(1, folder)
        with pytest.raises(InvalidConfiguration, match="absolute folder"):
            await control.export_adapter(1, Path("relative"))


async def test_stop_leaves_the_round(deployment):
    for number in range(3):
        await deployment.enrol(f"agent-{number}")
        steps = 3000 if number == 0 else 2
        training = {"steps": steps, "batch_size": 4, "threads": 1, "device": "cpu"}
        await deployment.start_agent(f"agent-{number}", number, training=training)
    await deployment.create(rounds=1)
    running = deployment.agents["agent-0"]
    await until(lambda: running.agent.board.status.activity is Activity.TRAINING, "agent-0 trains")
    async with running.control() as control:
        await control.stop("battery low")
    assert (await asyncio.wait_for(running.life, 30)).activity is Activity.ENDED
    await deployment.finish()
    (found,) = await deployment.operator.rounds(FEDERATION)
    assert found.counted == ("agent-1", "agent-2")
    assert {member.agent: member.left_reason for member in found.members}["agent-0"] == "battery low"


async def test_the_command_line_talks_to_the_agent(deployment, tmp_path):
    for number in range(2):
        await deployment.enrol(f"agent-{number}")
        await deployment.start_agent(f"agent-{number}", number, exit_when_finished=False)
    running = deployment.agents["agent-0"]
    address = running.agent.config.control_address
    watching = await begin("watch", "--control", address)
    assert watching.stdout is not None
    assert json.loads(await watching.stdout.readline())["federation"] == FEDERATION
    code, output = await command("pause", "--control", address)
    assert (code, "(paused)" in output) == (0, True)
    code, output = await command("start", "--control", address, "--json")
    assert (code, json.loads(output)["paused"]) == (0, False)
    await deployment.create(target_agents=2, rounds=1)
    await until(lambda: all(one.agent.board.status.applied_round == 1 for one in deployment.agents.values()))
    code, output = await command("status", "--control", address)
    assert code == 0
    assert "agent-0 in clinics: waiting" in output
    assert "applied 1" in output
    assert "accuracy_after" in output
    code, output = await command("status", "--control", address, "--json")
    found = json.loads(output)
    assert (found["name"], found["applied_round"], found["activity"]) == ("agent-0", 1, "waiting")
    code, output = await command("export", "--control", address, str(tmp_path / "out"), "--json")
    assert (code, json.loads(output)) == (0, {"folder": str(tmp_path / "out"), "round": 1})
    code, output = await command("export", "--control", address, str(tmp_path / "again"), "--round", "1")
    assert (code, "adapter of round 1" in output.replace("\n", "")) == (0, True)
    code, output = await command("export", "--control", address, str(tmp_path / "out"))
    assert (code, "invalid_configuration" in output) == (EXIT_REFUSED, True)
    code, output = await command("stop", "--control", address, "--reason", "enough")
    assert (code, output) == (0, "")
    assert (await asyncio.wait_for(running.life, 30)).activity is Activity.ENDED
    lines, _ = await asyncio.wait_for(watching.communicate(), 30)
    assert watching.returncode == 0
    assert json.loads(lines.splitlines()[-1])["activity"] == "ended"


async def test_nobody_listens(tmp_path):
    address = f"unix:{tmp_path / 'none.sock'}"
    code, output = await command("status", "--control", address)
    assert (code, "peer_unreachable" in output) == (EXIT_UNREACHABLE, True)
    async with open_channel(address, None) as channel:
        with pytest.raises(PeerUnreachable):
            await ControlClient(channel).status()
