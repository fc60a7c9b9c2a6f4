"""The trained state of one agent as numbers: what rounds work on, free of any training library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from services.common.files import write_atomically
from shelora.errors import NonFiniteValue, RankMismatch, ShapeMismatch, StoredBytesCorrupt
from shelora.lora import Adapter, Factors
from shelora.plan import ModelShapes

_FORMAT: Final = "shelora adapter state 1"


@dataclass(frozen=True, eq=False)
class AdapterState:
    """Everything an agent trains, in the order of the model's shapes.

    Attributes:
        modules: one Adapter(b float64[m, r], a float64[r, n]) a LoRA module; r is the agent's rank.
        dense: float64 arrays, the tensors trained whole.
        residual: a module's part of the average behind the adapter's, left float64[m, p] @ right float64[p, n], kept in
            the frozen weights; empty unless the agent sends a larger rank than it trains. It is not trained.
    """

    modules: tuple[Adapter, ...]
    dense: tuple[NDArray[np.float64], ...]
    residual: tuple[Factors, ...] = ()

    def save(self, path: Path) -> None:
        """Write one safetensors file of float64, atomically: after a crash the old file or the new one is there.

        Raises:
            StorageFull: the disk takes no more.
        """
        tensors: dict[str, NDArray[Any]] = {}
        for index, module in enumerate(self.modules):
            tensors[f"modules.{index}.a"] = np.ascontiguousarray(module.a, dtype=np.float64)
            tensors[f"modules.{index}.b"] = np.ascontiguousarray(module.b, dtype=np.float64)
        for index, tensor in enumerate(self.dense):
            tensors[f"dense.{index}"] = np.ascontiguousarray(tensor, dtype=np.float64)
        metadata = {"format": _FORMAT, "modules": str(len(self.modules)), "dense": str(len(self.dense))}
        if self.residual:
            metadata["residual"] = str(len(self.residual))
        for index, kept in enumerate(self.residual):
            tensors[f"residual.{index}.left"] = np.ascontiguousarray(kept.left, dtype=np.float64)
            tensors[f"residual.{index}.right"] = np.ascontiguousarray(kept.right, dtype=np.float64)
        write_atomically(path, save(tensors, metadata=metadata))

    @classmethod
    def load(cls, path: Path) -> AdapterState:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            StoredBytesCorrupt: the file is not an adapter state.
        """
        if not path.is_file():
            raise FileNotFoundError(path)
        try:
            with safe_open(path, framework="numpy") as stored:
                metadata: Mapping[str, str] = stored.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise _corrupt(path, f"expected format {_FORMAT!r}, got {metadata.get('format')!r}")
                modules = tuple(
                    Adapter(b=stored.get_tensor(f"modules.{index}.b"), a=stored.get_tensor(f"modules.{index}.a"))
                    for index in range(int(metadata["modules"]))
                )
                dense = tuple(stored.get_tensor(f"dense.{index}") for index in range(int(metadata["dense"])))
                residual = tuple(
                    Factors(stored.get_tensor(f"residual.{index}.left"), stored.get_tensor(f"residual.{index}.right"))
                    for index in range(int(metadata.get("residual", 0)))
                )
        except (SafetensorError, KeyError, ValueError, RankMismatch) as error:
            raise _corrupt(path, f"expected complete float64 tensors, got {type(error).__name__}: {error}") from error
        return cls(modules=modules, dense=dense, residual=residual)

    def right_factors(self) -> list[NDArray[np.float64]]:
        """Per module A, with the residual's right factor below it: float64[sent rank at most, n]."""
        if not self.residual:
            return [module.a for module in self.modules]
        return [np.concatenate([own.a, kept.right]) for own, kept in zip(self.modules, self.residual, strict=True)]

    def check(self, shapes: ModelShapes, rank: int) -> None:
        """Refuse a state that does not belong to the model.

        Args:
            shapes: modules and dense tensors of the model, in order.
            rank: the rank of every module.

        Raises:
            ShapeMismatch: other number of tensors, or a tensor of another shape.
            RankMismatch: a module of another rank.
            NonFiniteValue: NaN or infinity.
        """
        counts, expected = (len(self.modules), len(self.dense)), (len(shapes.modules), len(shapes.dense))
        if counts != expected:
            raise ShapeMismatch(
                f"expected {expected[0]} modules and {expected[1]} dense tensors, got {counts[0]} and {counts[1]}",
                hint="the state was made for another model or other LoRA targets",
            )
        for module, shape in zip(self.modules, shapes.modules, strict=True):
            if module.rank != rank:
                raise RankMismatch(
                    f"module {shape.name}: expected rank {rank}, got {module.rank}", context={"module": shape.name}
                )
            _check_array(shape.name, module.b, (shape.out_features, rank))
            _check_array(shape.name, module.a, (rank, shape.in_features))
        for tensor, dense_shape in zip(self.dense, shapes.dense, strict=True):
            _check_array(dense_shape.name, tensor, dense_shape.shape)
        check_residual(self.residual, shapes)


def check_residual(residual: Sequence[Factors], shapes: ModelShapes) -> None:
    """Refuse a residual that does not belong to the model; an empty one belongs to all.

    Raises:
        ShapeMismatch: other number of modules, or factors of another shape.
        NonFiniteValue: NaN or infinity.
    """
    if residual and len(residual) != len(shapes.modules):
        raise ShapeMismatch(
            f"expected the residual of {len(shapes.modules)} modules or none, got {len(residual)}",
            hint="the state was made for another model or other LoRA targets",
        )
    for kept, shape in zip(residual, shapes.modules, strict=False):
        _check_array(shape.name, kept.left, (shape.out_features, kept.rank))
        _check_array(shape.name, kept.right, (kept.rank, shape.in_features))


def _check_array(name: str, array: NDArray[np.float64], shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ShapeMismatch(f"{name}: expected shape {shape}, got {array.shape}", context={"tensor": name})
    if not np.isfinite(array).all():
        raise NonFiniteValue(
            f"{name}: expected finite values, got NaN or infinity",
            hint="lower training.learning_rate",
            context={"tensor": name},
        )


def _corrupt(path: Path, detail: str) -> StoredBytesCorrupt:
    return StoredBytesCorrupt(
        f"adapter state {path.name}: {detail}",
        hint="delete the file; the agent fetches the last published average instead",
    )
