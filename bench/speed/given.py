"""A trainer whose training is already done: everything but the training of a round is the product's own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from bench.speed.load import Run
from services.client_agent.adapter import AdapterState
from services.client_agent.domain import Signature
from services.client_agent.peft_files import CONFIG_FILE, write_adapter_folder
from services.client_agent.ports import Float64
from services.client_agent.progress import Report
from services.common.files import write_atomically
from shelora.lora import Adapter, Factors

_DEVIATION: Final = 0.02
_ALPHA_OVER_RANK: Final = 2.0
_DIGEST: Final = hashlib.sha256(b"given updates").digest()


@dataclass(frozen=True)
class NoScore:
    """Nothing is evaluated."""

    accuracy: float = 0.0
    loss: float = 0.0
    examples: int = 0


class GivenTrainer:
    """Adapters with entries of standard deviation 0.02, as trained ones have; another one each round."""

    def __init__(self, run: Run, index: int) -> None:
        """Draw everything beforehand, so that no round pays for it."""
        self.signature = Signature(run.shapes, _DIGEST, _DIGEST, "sequence-classification", _DIGEST)
        self.examples = 100 + index
        self.rank = self.sent_rank = run.rank(index)
        self.scaling = _ALPHA_OVER_RANK
        rng = np.random.default_rng(index)
        self._adapters = [
            Adapter(
                rng.normal(scale=_DEVIATION, size=(shape.out_features, self.rank)).astype(np.float32),
                rng.normal(scale=_DEVIATION, size=(self.rank, shape.in_features)).astype(np.float32),
            )
            for shape in run.shapes.modules
        ]
        self._norms = tuple(rng.uniform(0.1, 5.0, shape.in_features) for shape in run.shapes.modules)
        self._state = AdapterState((), ())

    def initial_dense(self, stream: Callable[[str, int], Float64]) -> tuple[Float64, ...]:
        """There are no dense tensors."""
        return ()

    def activation_norms(self, report: Report) -> tuple[Float64, ...]:
        """Any norms do."""
        return self._norms

    def set_adapter(self, state: AdapterState) -> None:
        """Check and take it, as a model would."""
        state.check(self.signature.shapes, self.rank)
        self._state = state

    def get_adapter(self) -> AdapterState:
        """The present adapter."""
        return self._state

    def set_residual(self, residual: Sequence[Factors] | None) -> None:
        """What is trained is given, so nothing kept could change it."""

    def train(self, round_number: int, report: Report, should_stop: Callable[[], bool]) -> dict[str, float]:
        """Put the round's adapter in place; modules change places from round to round."""
        shift = round_number % len(self._adapters)
        self._state = AdapterState((*self._adapters[shift:], *self._adapters[:shift]), ())
        return {"loss": 0.0, "steps": 1.0, "stopped": 0.0}

    def evaluate(self, report: Report) -> NoScore:
        """Nothing to measure."""
        return NoScore()

    def save_adapter(self, folder: Path, state: AdapterState) -> None:
        """Write a folder in PEFT's format."""
        state.check(self.signature.shapes, self.rank)
        config = {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": _ALPHA_OVER_RANK * self.rank,
            "target_modules": [shape.name for shape in self.signature.shapes.modules],
            "inference_mode": True,
        }
        arrays = {}
        for shape, module in zip(self.signature.shapes.modules, state.modules, strict=True):
            arrays[f"base_model.model.{shape.name}.lora_A.weight"] = module.a
            arrays[f"base_model.model.{shape.name}.lora_B.weight"] = module.b
        text = json.dumps(config)
        write_adapter_folder(folder, arrays, lambda written: write_atomically(written / CONFIG_FILE, text.encode()))
