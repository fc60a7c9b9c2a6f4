"""The product's trainer, loaded once: every agent is a rank, some rows and a seed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from bench.parity.corpus import Corpus
from bench.parity.exchange import FEDERATION
from bench.parity.setting import Setting
from services.client_agent.adapter import AdapterState
from services.client_agent.config import AgentConfig
from services.client_agent.domain import Signature
from services.client_agent.training import Evaluation, Trainer
from services.client_agent.training.adapters import TunedModel, attach
from services.client_agent.training.batches import Sequences, tokenize
from services.client_agent.training.data import digest_labels, pick_evenly
from services.client_agent.training.model import load_model
from shelora.plan import ModelShapes

Float64 = npt.NDArray[np.float64]
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Model:
    """What an agent works with.

    Attributes:
        adapter: of the agent's rank; its own residual, which the product keeps, goes into the frozen weights.
        residual: float64[m, n] per module, added to the frozen weights as well; None adds nothing.
    """

    adapter: AdapterState
    residual: tuple[Float64, ...] | None = None


class Learner:
    """One agent: the product's trainer on its rows.

    Attributes:
        rank, scaling, examples: as the trainer has them.
        steps, learning_rate: optimizer steps a round, and their rate.
    """

    def __init__(self, bench: Bench, train: Sequences, config: AgentConfig) -> None:
        """Put rows and configuration on a model; learners of one bench must not work at the same time."""
        self._bench = bench
        self._curve = Trainer(config, bench.tuned, bench.signature, train, bench.curve, _no_clock)
        self._whole = Trainer(config, bench.tuned, bench.signature, train, bench.whole, _no_clock)
        self.rank, self.scaling, self.examples = self._curve.rank, self._curve.scaling, self._curve.examples
        self.steps, self.learning_rate = config.training.steps, config.training.learning_rate

    @property
    def adapter(self) -> AdapterState:
        """The adapter at hand."""
        return self._curve.get_adapter()

    def train(self, start: Model, number: int) -> AdapterState:
        """A round of the product's own local training."""
        self._bench.take(start)
        self._curve.train(number)
        return self._curve.get_adapter()

    def evaluate(self, model: Model, *, whole: bool) -> Evaluation:
        """Accuracy and loss on the test texts, on all of them or on those of the curve."""
        self._bench.take(model)
        return (self._whole if whole else self._curve).evaluate()

    def initial_dense(self, stream: Callable[[str, int], Float64]) -> tuple[Float64, ...]:
        """Tensors trained whole before the first round."""
        return self._curve.initial_dense(stream)


@dataclass(frozen=True, eq=False)
class Bench:
    """A model with LoRA pairs of one rank, and the test texts."""

    tuned: TunedModel
    signature: Signature
    curve: Sequences
    whole: Sequences
    frozen: tuple[torch.Tensor, ...]

    def take(self, model: Model) -> None:
        """Load adapter and residuals."""
        self.tuned.frozen.keep(None)
        with torch.no_grad():
            for index, (layer, weight) in enumerate(zip(self.tuned.layers, self.frozen, strict=True)):
                base: Any = layer.get_base_layer().weight
                base.copy_(weight)
                if model.residual is not None:
                    added = torch.from_numpy(model.residual[index]).to(base.dtype)
                    base += added.T if layer.fan_in_fan_out else added
        self.tuned.frozen.keep(model.adapter.residual)
        self.tuned.write(model.adapter)


class Lab:
    """One base model in memory, with LoRA pairs for every agent and for a centralised learner of the largest rank.

    Attributes:
        shapes: what is averaged.
        labels: class of every training text, as text.
    """

    def __init__(self, corpus: Corpus, setting: Setting, threads: int) -> None:
        """Load the model and the texts; work with so many threads."""
        self._setting, self._threads = setting, threads
        self._config = _configure(setting, corpus.labels)
        section = self._config.model
        loaded = load_model(section, corpus.labels, self._config.training.precision)
        self._train = tokenize(corpus.train, loaded, corpus.labels, section.task)
        whole = tokenize(corpus.test, loaded, corpus.labels, section.task)
        chosen = pick_evenly(range(len(whole)), setting.curve_texts)
        self.labels = [str(row.label) for row in corpus.train]
        self._benches = []
        for rank in (*setting.ranks, max(setting.ranks)):
            network = replace(loaded, network=copy.deepcopy(loaded.network))
            lora = self._config.lora.model_copy(update={"rank": rank})
            tuned = attach(network, lora, section.task, corpus.labels)
            signature = Signature(
                shapes=tuned.shapes,
                base_model_digest=loaded.base_model_digest,
                tokenizer_digest=loaded.tokenizer_digest,
                task=section.task,
                labels_digest=digest_labels(corpus.labels),
            )
            frozen = tuple(layer.get_base_layer().weight.detach().clone() for layer in tuned.layers)
            self._benches.append(Bench(tuned, signature, pick(whole, chosen), whole, frozen))
        self.shapes: ModelShapes = self._benches[0].tuned.shapes

    def learners(self, shares: Sequence[Sequence[int]], seed: int) -> list[Learner]:
        """One learner an agent, with these rows of the training texts."""
        setting = self._setting
        return [
            self._learner(index, rows, seed, setting.steps, setting.learning_rate) for index, rows in enumerate(shares)
        ]

    def central(self, seed: int) -> Learner:
        """A learner with all texts that takes as many steps a round as all agents together, each that much smaller.

        An average of n agents moves as far as one of them; at their rate, n times the steps do not settle (measured).
        """
        setting, agents = self._setting, len(self._setting.ranks)
        rate = setting.learning_rate / agents
        return self._learner(agents, range(len(self._train)), seed, setting.steps * agents, rate)

    def each(self, works: Sequence[Callable[[], Result]]) -> list[Result]:
        """Evaluate several learners at the same time, one thread each."""
        torch.set_num_threads(1)
        with ThreadPoolExecutor(self._threads) as pool:
            return list(pool.map(lambda work: work(), works))

    def alone(self, work: Callable[[], Result]) -> Result:
        """Do work of one learner with all threads; training draws dropout from the process's one generator."""
        torch.set_num_threads(self._threads)
        return work()

    def _learner(self, index: int, rows: Sequence[int], seed: int, steps: int, rate: float) -> Learner:
        changes = {"seed": 1000 * seed + index, "steps": steps, "learning_rate": rate}
        training = self._config.training.model_copy(update=changes)
        config = self._config.model_copy(update={"training": training})
        return Learner(self._benches[index], pick(self._train, rows), config)


def pick(sequences: Sequences, rows: Sequence[int]) -> Sequences:
    """Some rows."""
    tokens = tuple(sequences.tokens[row] for row in rows)
    return Sequences(tokens, sequences.labels[np.asarray(rows, dtype=np.int64)], sequences.pad_token_id)


def _configure(setting: Setting, labels: Sequence[str]) -> AgentConfig:
    """A configuration as an agent's file gives it; data, address and folder are never used."""
    return AgentConfig.model_validate(
        {
            "federation": FEDERATION,
            "aggregator": "127.0.0.1:1",
            "state_dir": Path("unused"),
            "model": {"source": setting.source, "labels": list(labels), "max_tokens": setting.max_tokens},
            "data": {"train": "unused.jsonl", "test": "unused.jsonl"},
            "training": {
                "batch_size": setting.batch_size,
                "learning_rate": setting.learning_rate,
                "label_balance": setting.label_balance,
                "device": "cpu",
            },
        }
    )


def _no_clock() -> float:
    return 0.0
