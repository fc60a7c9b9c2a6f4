from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench.processes import begin_peak, cpu_s, memory_bytes, touch_memory


def test_figures_of_a_process_are_read_from_the_system() -> None:
    assert memory_bytes(os.getpid(), "VmHWM") >= memory_bytes(os.getpid(), "VmRSS") // 2 > 0
    assert cpu_s(os.getpid()) > 0
    assert begin_peak() > 0
    with pytest.raises(ValueError, match="no VmNone"):
        memory_bytes(os.getpid(), "VmNone")


def test_touched_memory_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    unlink = Path.unlink

    def noted(path: Path, *, missing_ok: bool = False) -> None:
        sizes.append(path.stat().st_size)
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", noted)
    touch_memory(tmp_path / "scratch", (3 << 20) + 5)
    assert sizes == [(3 << 20) + 5]
    assert not list(tmp_path.iterdir())
