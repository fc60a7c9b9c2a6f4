"""LoRA on a base model: attach it, read and write its numbers, save and load PEFT's own format."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file

from services.client_agent.adapter import AdapterState
from services.client_agent.config import LoraSection
from services.client_agent.peft_files import WEIGHTS_FILE, write_adapter_folder
from services.client_agent.training.model import LoadedModel
from services.client_agent.training.residual import FrozenWeights
from services.client_agent.training.targets import (
    check_disjoint,
    choose_saved_modules,
    choose_targets,
    uses_transposed_weights,
)
from services.common.files import write_atomically
from shelora.errors import InvalidConfiguration, StoredBytesCorrupt
from shelora.lora import Adapter, lora_scaling
from shelora.plan import DenseShape, ModelShapes, ModuleShape

LABELS_FILE: Final = "labels.json"

_PREFIX: Final = "base_model.model."
_ADAPTER: Final = "default"
_TASK_TYPES: Final = {"sequence-classification": TaskType.SEQ_CLS, "causal-lm": TaskType.CAUSAL_LM}

UniformStream = Callable[[str, int], NDArray[np.float64]]
"""(tensor name, count) -> float64[count] uniform in [0, 1); the same on every agent."""


@dataclass(frozen=True, eq=False)
class TunedModel:
    """A base model with LoRA pairs and tensors trained whole.

    Attributes:
        peft: the PEFT model.
        shapes: LoRA modules and dense tensors in the order of the model's own module tree.
        layers: the LoRA layer of every module.
        tensors: the parameter of every dense tensor.
        fresh: names of the dense tensors that the checkpoint does not hold.
        rank: LoRA rank.
        sent_rank: rank of what is sent.
        scaling: alpha / rank.
        frozen: the weights under the LoRA pairs.
        labels: ordered class names, saved beside the adapter.
    """

    peft: Any
    shapes: ModelShapes
    layers: tuple[Any, ...]
    tensors: tuple[torch.nn.Parameter, ...]
    fresh: frozenset[str]
    rank: int
    sent_rank: int
    scaling: float
    frozen: FrozenWeights
    labels: tuple[str, ...]

    def read(self) -> AdapterState:
        """The present numbers, as float64."""
        return AdapterState(
            modules=tuple(
                Adapter(b=_numbers(layer.lora_B[_ADAPTER].weight), a=_numbers(layer.lora_A[_ADAPTER].weight))
                for layer in self.layers
            ),
            dense=tuple(_numbers(tensor) for tensor in self.tensors),
        )

    def write(self, state: AdapterState) -> None:
        """Take over a state.

        Raises:
            ShapeMismatch, RankMismatch, NonFiniteValue: the state does not belong to this model.
        """
        state.check(self.shapes, self.rank)
        with torch.no_grad():
            for layer, module in zip(self.layers, state.modules, strict=True):
                layer.lora_A[_ADAPTER].weight.copy_(torch.from_numpy(module.a))
                layer.lora_B[_ADAPTER].weight.copy_(torch.from_numpy(module.b))
            for tensor, numbers in zip(self.tensors, state.dense, strict=True):
                tensor.copy_(torch.from_numpy(np.asarray(numbers)))

    def initial_dense(self, stream: UniformStream) -> tuple[NDArray[np.float64], ...]:
        """Dense tensors before the first round: pretrained values, or draws from the stream where there are none.

        New matrices are uniform with the standard deviation of the model's own initialisation, new biases are 0 and new
        norm weights 1.
        """
        deviation = float(getattr(self.peft.config, "initializer_range", None) or 0.02)
        drawn: list[NDArray[np.float64]] = []
        for shape, tensor in zip(self.shapes.dense, self.tensors, strict=True):
            if shape.name not in self.fresh:
                drawn.append(_numbers(self._pretrained(shape.name, tensor)))
            elif len(shape.shape) < 2:
                drawn.append(np.full(shape.shape, 0.0 if shape.name.endswith("bias") else 1.0))
            else:
                uniform = np.asarray(stream(shape.name, shape.size), dtype=np.float64).reshape(shape.shape)
                drawn.append((2.0 * uniform - 1.0) * (np.sqrt(3.0) * deviation))
        return tuple(drawn)

    def save(self, folder: Path, state: AdapterState) -> None:
        """Write a PEFT adapter folder; after a crash it is complete or not there.

        Raises:
            StorageFull: the disk takes no more.
            ShapeMismatch, RankMismatch, NonFiniteValue: the state does not belong to this model.
        """
        state.check(self.shapes, self.rank)
        arrays = [array for module in state.modules for array in (module.a, module.b)] + list(state.dense)
        write_adapter_folder(folder, dict(zip(self._stored_names(), arrays, strict=True)), self._write_config)

    def load(self, folder: Path) -> AdapterState:
        """Read what `save` wrote.

        Raises:
            StoredBytesCorrupt: tensors are missing or the file cannot be read.
            ShapeMismatch, RankMismatch, NonFiniteValue: the adapter belongs to another model.
        """
        path = folder / WEIGHTS_FILE
        try:
            tensors = load_file(path)
            arrays = [tensors[name].to(torch.float64).numpy() for name in self._stored_names()]
        except (OSError, SafetensorError, KeyError) as error:
            raise StoredBytesCorrupt(
                f"adapter {folder}: expected this model's tensors in {WEIGHTS_FILE}, got {error!r}",
                hint="name a folder that this agent or one with the same model and rank has saved",
            ) from error
        pairs = 2 * len(self.layers)
        modules = tuple(Adapter(a=arrays[index], b=arrays[index + 1]) for index in range(0, pairs, 2))
        state = AdapterState(modules, tuple(arrays[pairs:]))
        state.check(self.shapes, self.rank)
        return state

    def _stored_names(self) -> list[str]:
        names = [f"{_PREFIX}{module.name}.lora_{factor}.weight" for module in self.shapes.modules for factor in "AB"]
        return names + [_PREFIX + tensor.name for tensor in self.shapes.dense]

    def _write_config(self, folder: Path) -> None:
        self._saved_config().save_pretrained(str(folder))
        if self.labels:
            labels = json.dumps(list(self.labels), ensure_ascii=False)
            write_atomically(folder / LABELS_FILE, labels.encode())

    def _saved_config(self) -> LoraConfig:
        config = LoraConfig.from_peft_type(**self.peft.peft_config[_ADAPTER].to_dict())
        config.inference_mode = True
        return config

    def _pretrained(self, name: str, tensor: Any) -> Any:
        """PEFT keeps the module it copied: the value before any training."""
        owner, _, _ = name.rpartition(".")
        for path, module in self.peft.get_base_model().named_modules():
            if isinstance(module, ModulesToSaveWrapper) and (owner == path or owner.startswith(f"{path}.")):
                inner = name.removeprefix(f"{path}.")
                return dict(module.original_module.named_parameters())[inner]
        return tensor


def attach(loaded: LoadedModel, section: LoraSection, task: str, labels: tuple[str, ...]) -> TunedModel:
    """Put LoRA pairs on a base model and mark the tensors trained whole.

    Raises:
        InvalidConfiguration: targets or saved modules that the model does not have, a rank that is too large, a tensor
            that the checkpoint lacks and nobody trains, or quantised weights with a sent rank above the rank.
    """
    network = loaded.network
    targets = choose_targets(network, section.target_modules, loaded.fresh)
    saved = choose_saved_modules(network, section.modules_to_save, task, loaded.fresh)
    check_disjoint(network, targets, saved)
    config = LoraConfig(
        task_type=_TASK_TYPES[task],
        r=section.rank,
        lora_alpha=section.effective_alpha,
        lora_dropout=section.dropout,
        target_modules=list(targets),
        modules_to_save=list(saved) or None,
        fan_in_fan_out=uses_transposed_weights(network, targets),
        bias="none",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        peft: PeftModel = get_peft_model(network, config, adapter_name=_ADAPTER)
    modules, layers, dense, tensors = [], [], [], []
    for path, module in peft.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            _check_rank("lora.rank", path, module, section.rank)
            _check_rank("lora.sent_rank", path, module, section.effective_sent_rank)
            modules.append(ModuleShape(path, int(module.out_features), int(module.in_features)))
            layers.append(module)
        elif isinstance(module, ModulesToSaveWrapper):
            for name, tensor in module.modules_to_save[_ADAPTER].named_parameters():
                tensor.data = tensor.data.to(torch.float32)
                dense.append(DenseShape(f"{path}.{name}", tuple(tensor.shape)))
                tensors.append(tensor)
    _check_coverage(loaded.fresh, {shape.name for shape in dense})
    shapes = ModelShapes(tuple(modules), tuple(dense))
    frozen = FrozenWeights(shapes, layers)
    if section.effective_sent_rank > section.rank:
        frozen.check()
    return TunedModel(
        peft=peft,
        shapes=shapes,
        layers=tuple(layers),
        tensors=tuple(tensors),
        fresh=loaded.fresh,
        rank=section.rank,
        sent_rank=section.effective_sent_rank,
        frozen=frozen,
        scaling=lora_scaling(section.effective_alpha, section.rank),
        labels=labels,
    )


def _check_rank(setting: str, path: str, layer: Any, rank: int) -> None:
    largest = min(int(layer.out_features), int(layer.in_features))
    if rank > largest:
        raise InvalidConfiguration(f"{setting}: expected at most {largest} for module {path}, got {rank}")


def _check_coverage(fresh: Collection[str], dense: Collection[str]) -> None:
    uncovered = sorted(set(fresh) - set(dense))
    if uncovered:
        raise InvalidConfiguration(
            f"model.source: expected every untrained tensor in the checkpoint, missing are {', '.join(uncovered)}",
            hint="name the modules that own these tensors in lora.modules_to_save, or leave that field out",
        )


def _numbers(tensor: torch.Tensor) -> NDArray[np.float64]:
    return tensor.detach().to(device="cpu", dtype=torch.float64).numpy().copy()
