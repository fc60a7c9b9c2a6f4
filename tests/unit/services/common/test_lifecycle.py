from __future__ import annotations

import asyncio
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.common.files import make_folders, write_atomically
from services.common.lifecycle import remove_ready_file, run_until_signalled, write_ready_file

SERVICE = """
import asyncio, sys
from pathlib import Path
from services.common.lifecycle import remove_ready_file, run_until_signalled, write_ready_file
from services.common.logs import configure_logs
from services.common.ops import ops_app, serve_http
from services.common.server import GrpcServer
from services.common.metrics import new_registry

ready_file, patient = Path(sys.argv[1]), sys.argv[2] == "patient"

async def ready():
    return {}

async def main(stop):
    server = GrpcServer("127.0.0.1:0", None, lambda server: None)
    port = await server.start()
    async with serve_http(ops_app(ready, new_registry("test")), "127.0.0.1:0") as ops:
        write_ready_file(ready_file, {"grpc": port, "ops": ops})
        await stop.wait()
        remove_ready_file(ready_file)
        await server.drain(5)
        if not patient:
            await asyncio.Event().wait()
    ready_file.with_suffix(".drained").touch()
    return 7

configure_logs("test", json=True)
sys.exit(run_until_signalled(main))
"""


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    """Returns when the file is there; the process writes it."""
    while not path.exists():
        try:
            process.wait(timeout=0.05)
        except subprocess.TimeoutExpired:
            continue
        raise AssertionError(f"the process ended with {process.returncode}: {process.communicate()[1]}")


@pytest.fixture
def ready_file(tmp_path: Path) -> Path:
    return tmp_path / "ready.json"


@pytest.fixture
def service(request: pytest.FixtureRequest, ready_file: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", SERVICE, str(ready_file), request.param]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with process:
        wait_for(ready_file, process)
        yield process
        process.kill()


@pytest.mark.parametrize("service", ["patient"], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_the_process(service: subprocess.Popen[str], ready_file: Path, number: signal.Signals) -> None:
    fields = json.loads(ready_file.read_text())
    assert fields["pid"] == service.pid
    assert fields["grpc"] > 0
    assert fields["ops"] > 0
    service.send_signal(number)
    _, log = service.communicate(timeout=60)
    assert service.returncode == 7
    assert not ready_file.exists()
    assert ready_file.with_suffix(".drained").exists()
    events = [json.loads(line) for line in log.splitlines()]
    (told,) = [event for event in events if event["event"] == "signal received, draining"]
    assert told["signal"] == number.name


@pytest.mark.parametrize("service", ["stubborn"], indirect=True)
def test_a_second_signal_ends_a_process_that_does_not_drain(service: subprocess.Popen[str], ready_file: Path) -> None:
    service.send_signal(signal.SIGTERM)
    while ready_file.exists():
        with pytest.raises(subprocess.TimeoutExpired):
            service.wait(timeout=0.05)
    service.send_signal(signal.SIGTERM)
    _, log = service.communicate(timeout=60)
    assert service.returncode not in {0, 7}
    assert "second signal" in log
    assert not ready_file.with_suffix(".drained").exists()


@pytest.fixture
def usual_signals() -> Iterator[None]:
    """Python's own handlers: a test run in the background is started with SIGINT ignored."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL), signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
        signal.signal(number, handler)


def test_results_and_errors_of_main_come_through(usual_signals: None) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    async def answer(stop: asyncio.Event) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        await stop.wait()
        return 42

    async def fail(stop: asyncio.Event) -> int:
        raise ValueError("main failed")

    assert run_until_signalled(answer) == 42
    with pytest.raises(ValueError, match="main failed"):
        run_until_signalled(fail)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_a_ready_file_replaces_an_old_one(ready_file: Path) -> None:
    write_ready_file(ready_file, {"grpc": 1})
    write_ready_file(ready_file, {"grpc": 2})
    assert json.loads(ready_file.read_text()) == {"grpc": 2, "pid": os.getpid()}
    remove_ready_file(ready_file)
    remove_ready_file(ready_file)
    assert list(ready_file.parent.iterdir()) == []


def test_an_atomic_write_has_its_mode_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "secret"
    write_atomically(path, b"one", mode=0o600)
    write_atomically(path, b"two", mode=0o600)
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["secret"]
    make_folders(path.parent)


@pytest.mark.parametrize("synced", [True, False])
def test_what_is_not_synced_is_whole_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, synced: bool
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(os, "fsync", calls.append)
    write_atomically(tmp_path / "figures", b"one", synced=synced)
    assert (tmp_path / "figures").read_bytes() == b"one"
    assert [entry.name for entry in tmp_path.iterdir()] == ["figures"]
    assert len(calls) == (2 if synced else 0)


def test_a_failed_atomic_write_keeps_the_old_file(tmp_path: Path) -> None:
    folder = tmp_path / "taken"
    folder.mkdir()
    (folder / "inside").touch()
    with pytest.raises(OSError, match="directory"):
        write_atomically(folder, b"a file cannot replace a folder")
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]
