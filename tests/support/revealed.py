"""Checks a round by what agents wrote for verification: the average of clear factors against every opened average."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open

from shelora.lora import Factors, plaintext_average


@dataclass(frozen=True)
class Verdict:
    """What the files of one round say.

    Attributes:
        counted: agents in the average.
        openings: agents that opened it.
        difference: largest difference between an entry of an opened average and of the true one, relative to the larger
            of 1 and the largest true entry.
    """

    counted: tuple[str, ...]
    openings: tuple[str, ...]
    difference: float


def verify_round(folders: Mapping[str, Path], number: int) -> Verdict:
    """Compare one round in the reveal folders of the agents, by agent name."""
    opened = {}
    for agent, folder in folders.items():
        path = folder / f"round-{number:03d}-average.safetensors"
        if path.exists():
            opened[agent] = _read(path)
    assert opened, f"nobody opened the average of round {number}"
    counted = {tuple(json.loads(metadata["counted"])) for _, metadata in opened.values()}
    assert len(counted) == 1, f"round {number}: agents disagree on who counts: {counted}"
    members = counted.pop()
    sent = [_read(folders[agent] / f"round-{number:03d}-factors.safetensors") for agent in members]
    weights = [float(metadata["examples"]) for _, metadata in sent]
    worst = 0.0
    for tensors, _ in opened.values():
        for index in range(sum(name.endswith(".basis") for name in tensors)):
            factors = [Factors(one[f"{index}.left"], one[f"{index}.right"]) for one, _ in sent]
            found = tensors[f"{index}.basis"] @ tensors[f"{index}.core"]
            worst = max(worst, _difference(found, plaintext_average(factors, weights)))
        for name in (name for name in tensors if name.startswith("dense.")):
            true = np.average([one[name] for one, _ in sent], axis=0, weights=weights)
            worst = max(worst, _difference(tensors[name], true))
    return Verdict(members, tuple(sorted(opened)), worst)


def _difference(found: np.ndarray, true: np.ndarray) -> float:
    return float(np.abs(found - true).max() / max(1.0, np.abs(true).max()))


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118  # no mapping
