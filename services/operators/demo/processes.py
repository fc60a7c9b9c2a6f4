"""The demonstration's child processes: started on a leash, ended in order, never left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from services.common.clock import Clock
from services.operators.demo import leash
from shelora.errors import InternalFault, Unavailable

GRACE_S: Final = 10.0
"""How long a process may take to end after SIGTERM before it is killed."""

_POLL_S: Final = 0.05
_LOG_TAIL_BYTES: Final = 64 * 1024

Spawn = Callable[[Sequence[str], Mapping[str, str], Path], "subprocess.Popen[bytes]"]
"""Starts a command with an environment, both outputs appended to a file, in a session of its own."""


def spawn_leashed(command: Sequence[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start a command that dies with this process; call it from the main thread."""
    tied = [sys.executable, "-I", "-S", leash.__file__, str(os.getpid()), *command]
    with log.open("ab") as output:
        return subprocess.Popen(  # noqa: S603 - the command is made of our own interpreter and files
            tied,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


@dataclass(frozen=True)
class Worker:
    """One child process and its log file."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def exit_status(self) -> int | None:
        """None while it runs; negative for the signal that ended it."""
        return self.process.poll()

    def last_lines(self, count: int = 20) -> list[str]:
        """The end of its log."""
        with self.log.open("rb") as stream:
            stream.seek(max(0, self.log.stat().st_size - _LOG_TAIL_BYTES))
            return stream.read().decode("utf-8", errors="replace").splitlines()[-count:]

    def send(self, number: signal.Signals) -> None:
        """Signal the process and whatever it started itself."""
        if self.exit_status is None:
            os.killpg(self.process.pid, number)


def failure(worker: Worker, why: str) -> InternalFault:
    """The error for a process that ended although it was still needed; its context names the worker."""
    return InternalFault(f"{worker.name} {why}", hint=f"its log is {worker.log}", context={"worker": worker.name})


class Crew:
    """All child processes of one demonstration.

    Args:
        environment: for all of them; a start may add to it.
        logs: folder of the log files.
        clock: for waiting.
        spawn: starts a process.
    """

    def __init__(self, environment: Mapping[str, str], logs: Path, clock: Clock, spawn: Spawn = spawn_leashed) -> None:
        self._environment = dict(environment)
        self._logs = logs
        self._clock = clock
        self._spawn = spawn
        self.workers: dict[str, Worker] = {}

    def start(self, name: str, arguments: Sequence[str], extra: Mapping[str, str] | None = None) -> Worker:
        """Start a module of this project: `arguments` follow the interpreter."""
        log = self._logs / f"{name}.log"
        process = self._spawn([sys.executable, *arguments], {**self._environment, **(extra or {})}, log)
        worker = Worker(name, process, log)
        self.workers[name] = worker
        return worker

    async def finish(self, worker: Worker) -> None:
        """Wait until a process that runs to its end has done so.

        Raises:
            InternalFault: it ended with another status than 0.
        """
        while worker.exit_status is None:
            await self._clock.sleep(_POLL_S)
        if worker.exit_status != 0:
            raise failure(worker, f"ended with {describe_exit(worker.exit_status)}")

    async def ready(self, worker: Worker, file: Path, patience_s: float) -> None:
        """Wait until a service has written its ready file.

        Raises:
            InternalFault: it ended before.
            Unavailable: it did neither in time.
        """
        deadline_s = self._clock.monotonic_s() + patience_s
        while not _is_there(file):
            if worker.exit_status is not None:
                raise failure(worker, f"ended with {describe_exit(worker.exit_status)} before it served")
            if self._clock.monotonic_s() > deadline_s:
                raise Unavailable(f"{worker.name} does not serve after {patience_s:.0f} s", hint=f"read {worker.log}")
            await self._clock.sleep(_POLL_S)

    def check(self, names: Sequence[str]) -> None:
        """Make sure that these processes still run.

        Raises:
            InternalFault: one of them does not.
        """
        for name in names:
            worker = self.workers[name]
            if worker.exit_status is not None:
                raise failure(worker, f"ended with {describe_exit(worker.exit_status)} while it was needed")

    async def stop(self, names: Sequence[str] | None = None, grace_s: float = GRACE_S) -> None:
        """End processes, all unless named: SIGTERM, then SIGKILL for those that take too long."""
        chosen = [worker for name, worker in self.workers.items() if names is None or name in names]
        for worker in chosen:
            worker.send(signal.SIGTERM)
        deadline_s = self._clock.monotonic_s() + grace_s
        while any(worker.exit_status is None for worker in chosen) and self._clock.monotonic_s() < deadline_s:
            await self._clock.sleep(_POLL_S)
        self.kill(names)

    def kill(self, names: Sequence[str] | None = None) -> None:
        """End processes at once, all unless named, and wait for them."""
        chosen = [worker for name, worker in self.workers.items() if names is None or name in names]
        for worker in chosen:
            worker.send(signal.SIGKILL)
        for worker in chosen:
            worker.process.wait()


def _is_there(file: Path) -> bool:
    return file.exists()


def describe_exit(status: int | None) -> str:
    """An exit status in words."""
    if status is not None and status < 0:
        return f"signal {signal.Signals(-status).name}"
    return f"exit status {status}"
