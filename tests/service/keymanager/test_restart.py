"""The key manager as a process: restarts, kill -9, SIGTERM."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from pathlib import Path

import pytest

from services.common.clock import SystemClock
from services.common.identity import Role
from services.common.keymanager_client import KeyManagerClient, open_secrets
from services.common.sealing import SealingKey
from services.keymanager.host import initialise, opened
from shelora.errors import PeerUnreachable, SheLoraError
from support.keymanager import FEDERATION, Running, keymanager_config, serving_keymanager, stored_secrets

KEY = SealingKey.generate()
READY_WITHIN_S = 60


async def test_a_restart_changes_nothing_that_members_see(tmp_path: Path) -> None:
    async with serving_keymanager(tmp_path) as first:
        agent = await first.member(Role.AGENT, "agent-1")
        operator = await first.member(Role.OPERATOR, "alice")
        async with first.client(operator) as client:
            await client.rotate_epoch("scheduled")
        async with first.client(agent) as client:
            before = [await client.fetch_epoch(number, KEY.public_bytes()) for number in (1, 2)]
    async with serving_keymanager(tmp_path) as second, second.client(agent) as client:
        after = [await client.fetch_epoch(number, KEY.public_bytes()) for number in (1, 2)]
        for old, new in zip(before, after, strict=True):
            assert (old.number, old.public_key, old.parameters) == (new.number, new.public_key, new.parameters)
            opened_before, opened_after = (
                open_secrets(epoch.sealed_secrets, KEY, FEDERATION, epoch.number, "agent-1") for epoch in (old, new)
            )
            assert opened_before == opened_after
        async with second.client(operator) as boss:
            records = await boss.audit(limit=1000)
        assert [record.sequence for record in records] == list(range(1, len(records) + 1))


class Process:
    """`shelora-keymanager serve` as a child process."""

    def __init__(self, folder: Path, config: Path) -> None:
        self._folder = folder
        self._config = config
        self._child: asyncio.subprocess.Process | None = None

    async def start(self) -> Running:
        ready_file = self._folder / "ready.json"
        ready_file.unlink(missing_ok=True)
        arguments = ("-m", "services.keymanager", "serve", "--config", str(self._config))
        with (self._folder / "log").open("ab") as log:
            self._child = await asyncio.create_subprocess_exec(
                sys.executable, *arguments, "--ready-file", str(ready_file), stdout=log, stderr=log
            )
        deadline_s = time.monotonic() + READY_WITHIN_S
        while not ready_file.exists():
            assert self._child.returncode is None, (self._folder / "log").read_text()
            assert time.monotonic() < deadline_s, (self._folder / "log").read_text()
            await asyncio.sleep(0.05)
        return Running(keymanager_config(self._folder), self._folder, json.loads(ready_file.read_text()))

    async def end(self, number: signal.Signals) -> int:
        assert self._child is not None
        if self._child.returncode is None:
            self._child.send_signal(number)
        return await self._child.wait()


@pytest.fixture
async def process(tmp_path: Path) -> Process:
    config = keymanager_config(tmp_path)
    await initialise(config, SystemClock())
    file = tmp_path / "keymanager.yaml"
    listening = {f"{port}listen": "127.0.0.1:0" for port in ("", "enrolment_", "membership_", "ops_")}
    file.write_text(json.dumps({"federation": FEDERATION, **listening, "state_dir": "state", "kek_file": "kek"}))
    return Process(tmp_path, file)


@pytest.mark.slow
async def test_kill_9_in_the_middle_of_rotations_loses_nothing_acknowledged(process: Process, tmp_path: Path) -> None:
    running = await process.start()
    acknowledged = [1]
    try:
        operator = await running.member(Role.OPERATOR, "alice")
        async with running.client(operator) as client:
            busy = asyncio.Event()

            async def rotate_forever() -> None:
                while True:
                    acknowledged.append((await client.rotate_epoch("soon")).number)
                    if len(acknowledged) == 5:
                        busy.set()

            task = asyncio.create_task(rotate_forever())
            await asyncio.wait_for(busy.wait(), READY_WITHIN_S)
            assert await process.end(signal.SIGKILL) == -signal.SIGKILL
            with pytest.raises(SheLoraError):
                await task
        known = await stored_secrets(running.config)
        again = await process.start()
        async with again.client(operator) as client:
            epochs = await client.list_epochs()
            assert [epoch.number for epoch in epochs] == list(range(len(epochs), 0, -1))
            assert len(epochs) - len(acknowledged) in {0, 1}
            assert [epoch.state for epoch in epochs] == ["current"] + ["superseded"] * (len(epochs) - 1)
            assert (await client.rotate_epoch("after")).number == len(epochs) + 1
        assert (await stored_secrets(running.config))[2:] == known
        async with opened(running.config, SystemClock()) as keymanager:
            await keymanager.verify_audit()
    finally:
        await process.end(signal.SIGKILL)


@pytest.mark.slow
async def test_sigterm_drains_and_ends_well(process: Process, tmp_path: Path) -> None:
    running = await process.start()
    try:
        operator = await running.member(Role.OPERATOR, "alice")
        async with running.client(operator) as client:
            await client.list_epochs()
            assert await process.end(signal.SIGTERM) == 0
            assert not (tmp_path / "ready.json").exists()
        async with running.channel(operator) as channel:
            with pytest.raises(PeerUnreachable):
                await KeyManagerClient(channel, deadline_s=2).list_epochs()
    finally:
        await process.end(signal.SIGKILL)
