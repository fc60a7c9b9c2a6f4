"""Clear copies of an agent's updates for verification runs. Never switched on where data is private."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save as render_tensors

from services.client_agent.round import AveragedUpdate, LocalUpdate
from services.client_agent.state import update_tensors, write_file


class Reveal:
    """Writes what must otherwise never leave the agent: its own factors and opened averages, float64, true order."""

    def __init__(self, folder: Path) -> None:
        """Write below this folder."""
        self._folder = folder

    def factors(self, round_number: int, update: LocalUpdate, examples: int) -> None:
        """`round-<n>-factors.safetensors`: "<module>.left", "<module>.right", "dense.<tensor>"; metadata examples."""
        data = render_tensors(update_tensors(update), metadata={"examples": str(examples)})
        write_file(self._folder / f"round-{round_number:03d}-factors.safetensors", data)

    def average(self, round_number: int, opened: AveragedUpdate, counted: Sequence[str]) -> None:
        """`round-<n>-average.safetensors`: "<module>.basis", "<module>.core", "dense.<tensor>"; metadata counted."""
        tensors = {f"{index}.basis": np.ascontiguousarray(basis) for index, basis in enumerate(opened.basis)}
        tensors |= {f"{index}.core": np.ascontiguousarray(core) for index, core in enumerate(opened.core)}
        tensors |= {f"dense.{index}": np.ascontiguousarray(tensor) for index, tensor in enumerate(opened.dense)}
        data = render_tensors(tensors, metadata={"counted": json.dumps(list(counted))})
        write_file(self._folder / f"round-{round_number:03d}-average.safetensors", data)
