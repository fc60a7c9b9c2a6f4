"""What processes have used, as the kernel counts it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_RESET_PEAK: Final = "5"
_BLOCK_BYTES: Final = 1 << 20


def cpu_s(pid: int) -> float:
    """Processor seconds of a process and all its threads so far."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def begin_peak() -> int:
    """Count this process's peak (VmHWM) from now on; answers what is resident now."""
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK, encoding="ascii")
    return memory_bytes(os.getpid(), "VmRSS")


def memory_bytes(pid: int, name: str) -> int:
    """One of the kernel's figures of a process, for example VmRSS (resident now) or VmHWM (at its peak).

    Raises:
        ValueError: there is no such figure.
    """
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"expected a figure of process {pid}, got no {name}")


def touch_memory(scratch: Path, size_bytes: int) -> None:
    """Have that much of the page cache at hand: written to a file that is removed before the disk takes it.

    A virtual machine may have given free memory back to its host. The first write to each page then waits for the host,
    five times as long as for the copy itself where this was measured, and about two seconds after a page was last used
    it can be gone again: no cost of the program that happens to write first.

    Args:
        scratch: the file; must not exist.
        size_bytes: how much.
    """
    block = bytes(_BLOCK_BYTES)
    try:
        with scratch.open("xb", buffering=0) as file:
            for start in range(0, size_bytes, _BLOCK_BYTES):
                file.write(block[: size_bytes - start])
    finally:
        scratch.unlink(missing_ok=True)
