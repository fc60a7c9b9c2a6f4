"""Local training: everything an agent asks of model and data, behind one class."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from services.client_agent.adapter import AdapterState
from services.client_agent.config import DEFAULT_STEPS, AgentConfig
from services.client_agent.domain import Signature
from services.client_agent.training import calibration, evaluation
from services.client_agent.training.adapters import TunedModel, UniformStream, attach
from services.client_agent.training.batches import Sequences, collate, count_steps, draw_batches, tokenize
from services.client_agent.training.data import digest_labels, load_corpus
from services.client_agent.training.evaluation import Evaluation, Progress, score
from services.client_agent.training.model import DTYPES, choose_device, load_model
from services.client_agent.training.optimization import absent_offset, make_optimizer, round_seed
from shelora.errors import InvalidConfiguration, NonFiniteValue
from shelora.lora import Factors

_CALIBRATION_ROUND: Final = 0


def ignore(fraction: float, detail: str) -> None:
    """Report progress to nobody."""


def never() -> bool:
    """Go on whatever happens."""
    return False


class Trainer:
    """One agent's base model, adapter and data.

    The same configuration, state and number of threads give the same numbers. Use it from one thread at a time; only
    `save_adapter` may run beside a training.

    Attributes:
        signature: what all agents of a federation have in common.
        labels: ordered class names; empty for causal-lm.
        examples: number of local training texts.
        rank: LoRA rank of this agent.
        sent_rank: rank of what this agent sends.
        scaling: alpha / rank.
    """

    def __init__(
        self,
        config: AgentConfig,
        model: TunedModel,
        signature: Signature,
        train: Sequences,
        test: Sequences,
        clock: Callable[[], float],
    ) -> None:
        """Take loaded parts and move the model to its device; `load` makes the parts from a configuration."""
        self.signature, self.labels = signature, model.labels
        self.examples, self.rank, self.scaling = len(train), model.rank, model.scaling
        self.sent_rank = model.sent_rank
        self._section, self._task = config.training, config.model.task
        self._model, self._train, self._test, self._clock = model, train, test, clock
        self._device = choose_device(config.training.device)
        self._model.peft.to(self._device)

    @classmethod
    def load(cls, config: AgentConfig, clock: Callable[[], float] = time.monotonic) -> Trainer:
        """Load data, model and adapter as configured.

        Args:
            config: the agent's configuration.
            clock: monotonic seconds, for the figures of a training.

        Raises:
            InvalidConfiguration: data, model or LoRA settings that cannot be used; names file, line and field.
        """
        if config.training.threads is not None:
            torch.set_num_threads(config.training.threads)
        task = config.model.task
        corpus = load_corpus(config.data, config.model)
        loaded = load_model(config.model, corpus.labels, config.training.precision)
        train = tokenize(corpus.train, loaded, corpus.labels, task)
        test = tokenize(corpus.test, loaded, corpus.labels, task)
        tuned = attach(loaded, config.lora, task, corpus.labels)
        signature = Signature(
            shapes=tuned.shapes,
            base_model_digest=loaded.base_model_digest,
            tokenizer_digest=loaded.tokenizer_digest,
            task=task,
            labels_digest=digest_labels(corpus.labels),
        )
        return cls(config, tuned, signature, train, test, clock)

    def initial_dense(self, stream: UniformStream) -> tuple[NDArray[np.float64], ...]:
        """Dense tensors before the first round, in the order of the signature's shapes.

        Args:
            stream: (tensor name, count) -> float64[count] uniform in [0, 1), the same on every agent; asked only for
                matrices that the checkpoint does not hold.

        Returns:
            float64 arrays: pretrained values where there are any, else draws, so that all agents start equal.
        """
        return self._model.initial_dense(stream)

    def get_adapter(self) -> AdapterState:
        """The present adapter."""
        return self._model.read()

    def set_adapter(self, state: AdapterState) -> None:
        """Take over an adapter of this agent's rank.

        Raises:
            ShapeMismatch, RankMismatch, NonFiniteValue: it does not belong to this model.
        """
        self._model.write(state)

    def set_residual(self, residual: Sequence[Factors] | None) -> None:
        """Keep a part of the average in the frozen weights; training, evaluation and norms then go on top of it.

        Args:
            residual: left float64[m, p] and right float64[p, n] per module, instead of what was kept before; None
                restores the weights exactly.

        Raises:
            InvalidConfiguration: the base model is quantised.
            ShapeMismatch, NonFiniteValue: the residual belongs to another model.
        """
        self._model.frozen.keep(residual)

    def save_adapter(self, folder: Path, state: AdapterState) -> None:
        """Write a folder that `PeftModel.from_pretrained` loads; after a crash it is complete or not there.

        Raises:
            StorageFull: the disk takes no more.
            ShapeMismatch, RankMismatch, NonFiniteValue: the state does not belong to this model.
        """
        self._model.save(folder, state)

    def load_adapter(self, folder: Path) -> AdapterState:
        """Read a folder that `save_adapter` wrote.

        Raises:
            StoredBytesCorrupt: it cannot be read.
            ShapeMismatch, RankMismatch, NonFiniteValue: it belongs to another model or rank.
        """
        return self._model.load(folder)

    def activation_norms(self, report: Progress = ignore) -> tuple[NDArray[np.float64], ...]:
        """2-norm of every input column of every LoRA module over a few local batches, with the present adapter.

        Returns:
            float64[n] per module.
        """
        seed = round_seed(self._section.seed, _CALIBRATION_ROUND)
        size = self._section.batch_size
        steps = min(self._section.calibration_batches, -(-self.examples // size))
        batches = [
            partial(collate, self._train, chosen, self._device)
            for chosen in draw_batches(self._train.labels, size, steps, seed)
        ]
        return calibration.activation_norms(self._model.peft, self._model.layers, batches, self._autocast, report)

    def train(
        self, round_number: int, report: Progress = ignore, should_stop: Callable[[], bool] = never
    ) -> dict[str, float]:
        """Train the present adapter for one round.

        Args:
            round_number: chooses batches and dropout, together with the configured seed.
            report: called after every step.
            should_stop: asked before every step; when it says yes, the adapter is put back to where it was.

        Returns:
            loss (mean per text or token over the last quarter of the steps), loss_first, steps, seconds, and stopped
            (1.0 when the training was broken off, else 0.0).

        Raises:
            NonFiniteValue: the loss or the adapter stopped being a number; the adapter is put back.
        """
        started, before = self._clock(), self.get_adapter()
        section = self._section
        steps = count_steps(self.examples, section.batch_size, section.steps, section.epochs, DEFAULT_STEPS)
        seed = round_seed(section.seed, round_number)
        try:
            with torch.random.fork_rng(devices=self._random_devices()):
                torch.manual_seed(seed)
                losses = self._run_steps(steps, seed, report, should_stop)
            if losses is not None:
                self.get_adapter().check(self.signature.shapes, self.rank)
        except NonFiniteValue:
            self.set_adapter(before)
            raise
        if losses is None:
            self.set_adapter(before)
            return {"loss": 0.0, "loss_first": 0.0, "steps": 0.0, "seconds": self._clock() - started, "stopped": 1.0}
        tail = losses[-max(1, steps // 4) :]
        return {
            "loss": float(np.mean(tail)),
            "loss_first": losses[0],
            "steps": float(steps),
            "seconds": self._clock() - started,
            "stopped": 0.0,
        }

    def evaluate(self, report: Progress = ignore) -> Evaluation:
        """Loss and accuracy of the present adapter on the local test texts.

        Raises:
            InvalidConfiguration: there are none.
        """
        if not len(self._test):
            raise InvalidConfiguration("data.test: expected test texts, got none", hint="set data.test")
        return evaluation.evaluate(self._model.peft, self._test, self._task, self._device, self._autocast, report)

    def _run_steps(
        self, steps: int, seed: int, report: Progress, should_stop: Callable[[], bool]
    ) -> list[float] | None:
        """Losses of all steps, or None when told to stop."""
        pairs = [factor.weight for layer in self._model.layers for factor in _factors(layer)]
        optimizer, schedule = make_optimizer(self._section, steps, pairs, self._model.tensors)
        trained = [*pairs, *self._model.tensors]
        offset = absent_offset(self._train.labels, len(self.labels)) if self.labels else None
        offset = offset.to(self._device) if offset is not None else None
        self._model.peft.train()
        losses: list[float] = []
        balance = self._section.label_balance
        batches = draw_batches(self._train.labels, self._section.batch_size, steps, seed, balance)
        for step, chosen in enumerate(batches, start=1):
            if should_stop():
                return None
            with self._autocast():
                result = score(self._model.peft, collate(self._train, chosen, self._device), self._task, offset)
            loss = result.loss / result.count
            losses.append(loss.item())
            if not np.isfinite(losses[-1]):
                raise NonFiniteValue(
                    f"expected a finite training loss, got {losses[-1]} in step {step} of {steps}",
                    hint="lower training.learning_rate",
                )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch declares no types here
            torch.nn.utils.clip_grad_norm_(trained, self._section.max_gradient_norm)
            optimizer.step()
            schedule.step()
            report(step / steps, f"step {step} of {steps}, loss {losses[-1]:.3f}")
        return losses

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self._section.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype=DTYPES[self._section.precision])

    def _random_devices(self) -> list[torch.device]:
        return [self._device] if self._device.type == "cuda" else []


def _factors(layer: Any) -> tuple[Any, ...]:
    """The two trained matrices of a LoRA layer."""
    return (*layer.lora_A.values(), *layer.lora_B.values())
