"""Runs a program that dies with the process that started it; this file is executed as a script.

    python -I -S leash.py PARENT_PID PROGRAM ARGUMENT...

The kernel is asked to kill this process as soon as its parent is gone (PR_SET_PDEATHSIG), and the program then takes
its place, which keeps that setting. Doing this between fork and exec inside the parent would need code that is not safe
in a process with threads. The parent has to start its children from a thread that lives as long as itself.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Tie this process to its parent, then become the program."""
    parent, program = int(sys.argv[1]), sys.argv[2:]
    library = ctypes.CDLL(None, use_errno=True)
    if library.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    # The parent may have gone before the kernel was asked.
    if os.getppid() != parent:
        sys.exit(1)
    os.execv(program[0], program)  # noqa: S606 - no shell wanted; the program is what our own parent named


if __name__ == "__main__":
    main()
