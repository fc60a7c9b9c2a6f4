"""What processes have used, as the kernel counts it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_RESET_PEAK: Final = "5"


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
