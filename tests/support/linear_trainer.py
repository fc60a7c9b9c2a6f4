"""A model small enough to train in microseconds: linear maps and a dense tensor, pulled towards an agent's targets."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from services.client_agent.adapter import AdapterState
from services.client_agent.domain import Signature
from services.client_agent.progress import Report
from shelora.lora import Adapter, Factors
from shelora.plan import DenseShape, ModelShapes, ModuleShape

SHAPES = ModelShapes(
    (ModuleShape("layer.query", 24, 40), ModuleShape("layer.value", 16, 30)), (DenseShape("head.weight", (3, 7)),)
)
STEPS = 5
RATE = 0.2


def signature(shapes: ModelShapes = SHAPES) -> Signature:
    digest = hashlib.sha256(b"linear").digest()
    return Signature(shapes, digest, digest, "sequence-classification", digest)


@dataclass(frozen=True)
class Score:
    """What an evaluation finds."""

    accuracy: float
    loss: float
    examples: int


class LinearTrainer:
    """A Trainer: gradient descent on ||scaling * B A + residual - target||^2 of every module, and on the dense tensor.

    Same seed, adapter and round give the same numbers. A test may hold the training at `gate` or make it fail.

    Attributes:
        trained: rounds whose training was begun, in order.
        failures: raised by the next trainings, first first.
    """

    def __init__(
        self,
        seed: int,
        *,
        rank: int = 4,
        examples: int = 50,
        shapes: ModelShapes = SHAPES,
        sent_rank: int | None = None,
    ) -> None:
        rng = np.random.default_rng(seed)
        self.signature = signature(shapes)
        self.examples = examples
        self.rank = rank
        self.sent_rank = sent_rank or rank
        self.residuals: list[np.ndarray] = []
        self.scaling = 2.0
        self._shapes = shapes
        self._seed = seed
        self._targets = [rng.normal(size=(shape.out_features, shape.in_features)) for shape in shapes.modules]
        self._goals = [rng.normal(size=shape.shape) for shape in shapes.dense]
        self._norms = tuple(rng.uniform(0.1, 5.0, shape.in_features) for shape in shapes.modules)
        self._state: AdapterState | None = None
        self.trained: list[int] = []
        self.evaluations = 0
        self.failures: list[BaseException] = []
        self.gate = threading.Event()
        self.gate.set()
        self.training = threading.Event()

    def initial_dense(self, stream: Callable[[str, int], np.ndarray]) -> tuple[np.ndarray, ...]:
        return tuple(stream(shape.name, shape.size).reshape(shape.shape) for shape in self._shapes.dense)

    def activation_norms(self, report: Report) -> tuple[np.ndarray, ...]:
        report(1.0, "measured")
        return self._norms

    def set_adapter(self, state: AdapterState) -> None:
        state.check(self._shapes, self.rank)
        self._state = state

    def get_adapter(self) -> AdapterState:
        assert self._state is not None, "no adapter was set"
        return self._state

    def set_residual(self, residual: Sequence[Factors] | None) -> None:
        self.residuals = [kept.left @ kept.right for kept in residual or ()]

    def train(self, round_number: int, report: Report, should_stop: Callable[[], bool]) -> dict[str, float]:
        self.trained.append(round_number)
        self.training.set()
        if self.failures:
            raise self.failures.pop(0)
        while not self.gate.wait(0.01):
            if should_stop():
                return {"loss": 0.0, "stopped": 1.0}
        rng = np.random.default_rng([self._seed, round_number])
        state = self.get_adapter()
        for step in range(STEPS):
            state = self._stepped(state, rng)
            report((step + 1) / STEPS, f"step {step + 1}")
        self._state = state
        return {"loss": self._loss(), "steps": float(STEPS), "stopped": 0.0}

    def evaluate(self, report: Report) -> Score:
        self.evaluations += 1
        report(1.0, "evaluated")
        loss = self._loss()
        return Score(1.0 / (1.0 + loss), loss, 10)

    def save_adapter(self, folder: Path, state: AdapterState) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps({"r": self.rank}))

    def _stepped(self, state: AdapterState, rng: np.random.Generator) -> AdapterState:
        modules = []
        for module, target in zip(state.modules, self._missing(), strict=True):
            noisy = target + 0.1 * rng.normal(size=target.shape)
            gradient = self.scaling * (self.scaling * module.b @ module.a - noisy) / target.shape[1]
            modules.append(Adapter(module.b - RATE * gradient @ module.a.T, module.a - RATE * module.b.T @ gradient))
        dense = [tensor - RATE * (tensor - goal) for tensor, goal in zip(state.dense, self._goals, strict=True)]
        return AdapterState(tuple(modules), tuple(dense))

    def _missing(self) -> list[np.ndarray]:
        """What the adapter is to become: targets without what the frozen weights hold."""
        if not self.residuals:
            return self._targets
        return [target - kept for target, kept in zip(self._targets, self.residuals, strict=True)]

    def _loss(self) -> float:
        state = self.get_adapter()
        pairs = zip(state.modules, self._missing(), strict=True)
        return float(np.mean([np.mean((self.scaling * module.b @ module.a - target) ** 2) for module, target in pairs]))
