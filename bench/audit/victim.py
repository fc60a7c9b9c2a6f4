"""An agent under attack: its model, texts and training, all by the product's trainer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from transformers import AutoTokenizer

from bench.audit.wire import EPOCH, FEDERATION, SEED, Float32, Float64, Int64
from services.client_agent.adapter import AdapterState
from services.client_agent.config import EMBEDDED, AgentConfig, ModelSection
from services.client_agent.negotiation import sensitivities
from services.client_agent.training.batches import collate
from services.client_agent.training.checkpoint import locate
from services.client_agent.training.evaluation import score
from services.client_agent.training.trainer import Trainer
from shelora.lora import Adapter, canonical, initial_adapter, reparameterize
from shelora.plan import ModelShapes, fresh_rows, order_columns, uniform_stream

MAX_TOKENS: Final = 48
_GRADIENT_SHARE: Final = 0.1
"""A plain gradient step moves the adapter by this share of its norm: far above float32 rounding, still one step."""

_QUERY: Final = ("query", "q_proj", "q_lin")
_KEY: Final = ("key", "k_proj", "k_lin")


class PassEndedError(Exception):
    """Ends a forward pass once the first layer's input is there."""


@dataclass(frozen=True, eq=False)
class Projection:
    """A query or key projection of the first layer.

    Attributes:
        module: index of the LoRA module.
        rows: the rows of its output that belong to the projection; fused layers have several.
        weight, bias: float64[m, n] and float64[m] of the base model, which is public.
    """

    module: int
    rows: slice
    weight: Float64
    bias: Float64

    def apply(self, inputs: Float32) -> Float32:
        """Outputs for inputs, float32[..., m]."""
        outputs: Float32 = inputs @ self.weight.T.astype(np.float32) + self.bias.astype(np.float32)
        return outputs


class Victim:
    """One agent with some texts.

    Attributes:
        trainer: the product's trainer.
        texts: token sequences of the local data, in file order.
        places: whether a token's first-layer input depends on its place.
        first: indices of the LoRA modules that read the first layer's input.
    """

    def __init__(self, trainer: Trainer, special: frozenset[int]) -> None:
        """Wrap a loaded trainer; `load_victim` makes both."""
        self.trainer = trainer
        self._special = special
        self._model: Any = trainer._model  # the audit looks inside where an attacker would use the public base model
        self._sequences = trainer._train
        self.texts: tuple[Int64, ...] = tuple(tokens.astype(np.int64) for tokens in self._sequences.tokens)
        self.first = self._find_first()
        near, far = self.inputs(np.arange(4), 1), self.inputs(np.arange(4), 3)[2:3]
        self.places = not np.allclose(near, far)

    @property
    def shapes(self) -> ModelShapes:
        """What is trained."""
        return self.trainer.signature.shapes

    @property
    def heads(self) -> int:
        """Attention heads."""
        return int(self._model.peft.config.num_attention_heads)

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return int(self._model.peft.get_input_embeddings().num_embeddings)

    @property
    def special(self) -> frozenset[int]:
        """Tokens that frame every text and that everybody knows."""
        return self._special

    def first_start(self) -> AdapterState:
        """The adapter before the first round."""
        rank = self.trainer.rank
        modules = tuple(
            initial_adapter(
                rank,
                shape.out_features,
                fresh_rows(SEED, FEDERATION, EPOCH, shape.name, 0, rank, shape.in_features),
            )
            for shape in self.shapes.modules
        )
        dense = self.trainer.initial_dense(
            lambda name, count: uniform_stream(SEED.derive("initial dense", FEDERATION, EPOCH, name), count)
        )
        return AdapterState(modules, dense)

    def later_start(self, trained: AdapterState, scaling: float) -> AdapterState:
        """An adapter of this agent's rank for an average, here the update of one other agent, as `refit` makes it."""
        rank = self.trainer.rank
        modules: list[Adapter] = []
        for shape, module in zip(self.shapes.modules, trained.modules, strict=True):
            factors = canonical(module.b, module.a, scaling)
            basis, core = np.linalg.qr(factors.left)
            rows = fresh_rows(SEED, FEDERATION, EPOCH, shape.name, 1, rank, shape.in_features)
            modules.append(reparameterize(basis, core @ factors.right, rank, self.trainer.scaling, rows, missing=1e-6))
        return AdapterState(tuple(modules), trained.dense)

    def train(self, start: AdapterState, round: int) -> AdapterState:
        """A round of the product's own local training."""
        self.trainer.set_adapter(start)
        self.trainer.train(round)
        return self.trainer.get_adapter()

    def step(self, start: AdapterState, chosen: Sequence[int]) -> AdapterState:
        """One plain gradient step on some texts, without dropout: the easiest case for an attacker."""
        model = self._model
        self.trainer.set_adapter(start)
        model.peft.eval()
        weights = [factor.weight for layer in model.layers for factor in (layer.lora_A, layer.lora_B)
                   for factor in factor.values()]  # fmt: skip
        for weight in weights:
            weight.grad = None
        result = score(model.peft, collate(self._sequences, list(chosen), torch.device("cpu")), self._task)
        (result.loss / result.count).backward()  # type: ignore[no-untyped-call]  # torch declares no types here
        norms = [torch.cat([part.flatten() for part in parts]).norm()
                 for parts in (weights, [weight.grad for weight in weights])]  # fmt: skip
        with torch.no_grad():
            for weight in weights:
                weight -= _GRADIENT_SHARE * norms[0] / norms[1] * weight.grad
        return self.trainer.get_adapter()

    def priorities(self, adapter: AdapterState) -> list[Int64]:
        """The column order that this agent's sensitivities give."""
        self.trainer.set_adapter(adapter)
        scores = sensitivities(self.trainer.activation_norms(), [module.a for module in adapter.modules])
        return [order_columns(module_scores) for module_scores in scores]

    def inputs(self, tokens: Int64, places: int) -> Float32:
        """First-layer inputs of single tokens at the first places: float32[places, tokens, n]."""
        return np.stack([self.input(tokens, place) for place in range(places)])

    def projections(self, start: AdapterState | None = None) -> tuple[Projection, Projection]:
        """Query and key projection of the first layer, of the base model or with an adapter on it."""
        names = {index: self.shapes.modules[index].name.rpartition(".")[2] for index in self.first}
        query = next((index for index, name in names.items() if name in _QUERY), None)
        key = next((index for index, name in names.items() if name in _KEY), None)
        if query is not None and key is not None:
            return self._projection(query, 0, 1, start), self._projection(key, 0, 1, start)
        return self._projection(self.first[0], 0, 3, start), self._projection(self.first[0], 1, 3, start)

    def losses(self, adapter: AdapterState) -> Float64:
        """Loss of every local text under an adapter, in file order."""
        self.trainer.set_adapter(adapter)
        self._model.peft.eval()
        found = []
        with torch.inference_mode():
            for index in range(len(self.texts)):
                result = score(self._model.peft, collate(self._sequences, [index], torch.device("cpu")), self._task)
                found.append(float(result.loss) / result.count)
        return np.array(found)

    @property
    def _task(self) -> str:
        return self.trainer.signature.task

    def _projection(self, module: int, part: int, parts: int, start: AdapterState | None) -> Projection:
        layer = self._model.layers[module]
        base = layer.get_base_layer()
        weight = base.weight.detach().double().numpy()
        weight = weight.T if layer.fan_in_fan_out else weight
        if start is not None:
            weight = weight + self.trainer.scaling * (start.modules[module].b @ start.modules[module].a)
        bias = np.zeros(len(weight)) if base.bias is None else base.bias.detach().double().numpy()
        size = len(weight) // parts
        rows = slice(part * size, (part + 1) * size)
        return Projection(module, rows, weight[rows], bias[rows])

    def input(self, tokens: Int64, place: int) -> Float32:
        """First-layer inputs of single tokens at one place: float32[tokens, n]."""
        caught: list[torch.Tensor] = []

        def catch(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            caught.append(inputs[0].detach())
            raise PassEndedError

        handle = self._model.layers[self.first[0]].register_forward_pre_hook(catch)
        ids = torch.from_numpy(np.asarray(tokens))[:, None]
        self._model.peft.eval()
        try:
            with torch.inference_mode():
                network = self._model.peft.get_base_model()
                network(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=torch.full_like(ids, place))
        except PassEndedError:
            pass
        finally:
            handle.remove()
        values: Float32 = caught[0][:, 0].float().numpy()
        return values

    def _find_first(self) -> tuple[int, ...]:
        seen: dict[int, torch.Tensor] = {}
        handles = [
            layer.register_forward_pre_hook(lambda _module, inputs, index=index: seen.update({index: inputs[0]}))
            for index, layer in enumerate(self._model.layers)
        ]
        self._model.peft.eval()
        try:
            with torch.inference_mode():
                tokens = torch.tensor([[1, 2, 3]])
                self._model.peft.get_base_model()(input_ids=tokens, attention_mask=torch.ones_like(tokens))
        finally:
            for handle in handles:
                handle.remove()
        reference = seen[0]
        return tuple(
            index for index, value in seen.items() if value.shape == reference.shape and torch.equal(value, reference)
        )


def count_tokens(texts: list[str]) -> list[int]:
    """Lengths under the embedded model's tokenizer, framing tokens included."""
    tokenizer = AutoTokenizer.from_pretrained(locate(ModelSection()), local_files_only=True)
    return [len(tokens) for tokens in tokenizer(texts)["input_ids"]]


def load_victim(
    rows: Sequence[dict[str, Any]],
    folder: Path,
    *,
    rank: int,
    labels: Sequence[str] = (),
    batch_size: int = 16,
    steps: int = 30,
    source: str = EMBEDDED,
    task: str = "sequence-classification",
) -> Victim:
    """Load an agent with these texts.

    Args:
        rows: {"text", "label"} of its local data.
        folder: where the data file goes.
        rank: LoRA rank.
        labels: all classes; not for causal-lm.
        batch_size: texts a step.
        steps: optimizer steps a round.
        source: "embedded" or a folder.
        task: "sequence-classification" or "causal-lm".
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    model: dict[str, Any] = {"source": source, "task": task, "max_tokens": MAX_TOKENS}
    if task == "sequence-classification":
        model["labels"] = list(labels)
    config = AgentConfig.model_validate(
        {
            "federation": FEDERATION,
            "aggregator": "127.0.0.1:1",
            "state_dir": folder / "state",
            "model": model,
            "data": {"train": str(path)},
            "lora": {"rank": rank},
            "training": {"steps": steps, "batch_size": batch_size, "device": "cpu", "calibration_batches": 2},
            "evaluate": False,
        }
    )
    tokenizer = AutoTokenizer.from_pretrained(locate(config.model), local_files_only=True)
    return Victim(Trainer.load(config), frozenset(map(int, tokenizer.all_special_ids)))
