"""From start to signal to orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Final, TypeVar

import structlog

from services.common.files import write_atomically

Result = TypeVar("Result")

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)

_logger = structlog.get_logger(__name__)


def run_until_signalled(main: Callable[[asyncio.Event], Awaitable[Result]]) -> Result:
    """Run a service in a new event loop.

    Args:
        main: makes the service's main coroutine. It gets an event that is set at the first SIGTERM or SIGINT; it then
            drains and returns. A second signal cancels it.

    Returns:
        What main returns.

    Raises:
        KeyboardInterrupt: a second signal came before main had drained.
    """

    async def supervised() -> Result:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(main(stop))
        impatient = False

        def signalled(number: signal.Signals) -> None:
            nonlocal impatient
            if stop.is_set():
                impatient = True
                _logger.warning("second signal, not waiting any longer", signal=number.name)
                task.cancel()
            else:
                _logger.info("signal received, draining", signal=number.name)
                stop.set()

        for number in SIGNALS:
            loop.add_signal_handler(number, signalled, number)
        try:
            return await task
        except asyncio.CancelledError:
            if impatient:
                raise KeyboardInterrupt from None
            raise
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)

    return asyncio.run(supervised())


def write_ready_file(path: Path, fields: Mapping[str, str | int]) -> None:
    """Tell whoever started the process that it serves, and where.

    The file appears whole; it also names the process id under "pid".

    Args:
        path: the file; an old one is replaced.
        fields: for example {"grpc": 7443, "ops": 7480}.

    Raises:
        StorageFull: the disk takes no more.
    """
    content = json.dumps({"pid": os.getpid(), **fields}, sort_keys=True)
    write_atomically(path, content.encode() + b"\n")


def remove_ready_file(path: Path) -> None:
    """Take the ready file away, at the start of draining; a missing one is fine."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()


@contextlib.contextmanager
def announced(path: Path | None, fields: Mapping[str, str | int]) -> Iterator[None]:
    """The ready file is there inside the block, unless nobody asked for one."""
    if path is None:
        yield
        return
    write_ready_file(path, fields)
    try:
        yield
    finally:
        remove_ready_file(path)
