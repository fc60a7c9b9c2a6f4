from __future__ import annotations

import os

import pytest

from bench.processes import begin_peak, cpu_s, memory_bytes


def test_figures_of_a_process_are_read_from_the_system() -> None:
    assert memory_bytes(os.getpid(), "VmHWM") >= memory_bytes(os.getpid(), "VmRSS") // 2 > 0
    assert cpu_s(os.getpid()) > 0
    assert begin_peak() > 0
    with pytest.raises(ValueError, match="no VmNone"):
        memory_bytes(os.getpid(), "VmNone")
