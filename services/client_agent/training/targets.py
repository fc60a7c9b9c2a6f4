"""Which modules carry LoRA pairs and which are trained whole, when the configuration does not say."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from torch import nn
from transformers.pytorch_utils import Conv1D

from shelora.errors import InvalidConfiguration

# Attention's input projections by the names that architectures give them, fused where they are.
_USUAL_TARGETS: Final = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
    ("c_attn",),
    ("query_key_value",),
    ("Wqkv",),
    ("qkv_proj",),
    ("q", "k", "v"),
)
_HEADS: Final = ("classifier", "score")
_POOLER: Final = "pooler.dense"
_SHOWN_NAMES: Final = 12


def choose_targets(network: nn.Module, wanted: Sequence[str] | None, fresh: Collection[str] = ()) -> tuple[str, ...]:
    """Names of the linear layers that get LoRA pairs; a name stands for every module path that ends with it.

    By default: attention's query, key and value projections, and the pooler that a classification head stands on (an
    encoder trained for other ends has a pooler that the head learns little from), unless the checkpoint lacks it.

    Raises:
        InvalidConfiguration: a name that no module has, or a module that is not linear.
    """
    paths = {path: module for path, module in network.named_modules() if path}
    linear = {path for path, module in paths.items() if isinstance(module, nn.Linear | Conv1D)}
    if wanted is None:
        for names in _USUAL_TARGETS:
            if all(any(_matches(path, name) for path in linear) for name in names):
                known = {path for path in linear if not any(_inside(name, path) for name in fresh)}
                return (*names, _POOLER) if any(_matches(path, _POOLER) for path in known) else names
        raise _unknown("lora.target_modules", "the names of this architecture's attention projections", linear)
    for name in wanted:
        found = {path for path in paths if _matches(path, name)}
        if not found:
            raise _unknown("lora.target_modules", f"modules of the model, got {name!r}", linear)
        if not found <= linear:
            other = min(found - linear)
            kind = type(paths[other]).__name__
            raise InvalidConfiguration(
                f"lora.target_modules: expected linear layers, got {other} ({kind}) for {name!r}",
                hint="name the linear layers inside it",
            )
    return tuple(wanted)


def choose_saved_modules(
    network: nn.Module, wanted: Sequence[str] | None, task: str, fresh: Collection[str]
) -> tuple[str, ...]:
    """Names of the modules that are trained whole.

    By default: the head of a classifier, and for every task the owners of tensors that the checkpoint lacks. They are
    encrypted whole whatever the budget, so what can carry a LoRA pair is not saved.

    Raises:
        InvalidConfiguration: a name that no module has.
    """
    paths = [path for path, _ in network.named_modules() if path]
    if wanted is not None:
        for name in wanted:
            if not any(_matches(path, name) for path in paths):
                raise _unknown("lora.modules_to_save", f"modules of the model, got {name!r}", set(paths))
        return tuple(wanted)
    chosen: list[str] = []
    if task == "sequence-classification":
        chosen += [path for path in paths if path in _HEADS]
    owners = {name.rpartition(".")[0] for name in fresh}
    chosen += sorted(owner for owner in owners if owner and not any(_inside(owner, path) for path in chosen))
    return tuple(chosen)


def check_disjoint(network: nn.Module, targets: Sequence[str], saved: Sequence[str]) -> None:
    """Refuse LoRA pairs inside modules that are trained whole.

    Raises:
        InvalidConfiguration: names the module.
    """
    paths = [path for path, _ in network.named_modules() if path]
    whole = [path for path in paths if any(_matches(path, name) for name in saved)]
    for path in paths:
        if any(_matches(path, name) for name in targets) and any(_inside(path, owner) for owner in whole):
            raise InvalidConfiguration(
                f"lora.target_modules: {path} lies inside a module that is trained whole",
                hint="name it in lora.target_modules or in lora.modules_to_save, not in both",
            )


def uses_transposed_weights(network: nn.Module, targets: Sequence[str]) -> bool:
    """Whether the targets keep their weights as (in, out), as GPT-2 does."""
    return any(
        isinstance(module, Conv1D)
        for path, module in network.named_modules()
        if any(_matches(path, name) for name in targets)
    )


def _matches(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _inside(path: str, owner: str) -> bool:
    return path == owner or path.startswith(f"{owner}.")


def _unknown(setting: str, expected: str, known: Collection[str]) -> InvalidConfiguration:
    endings = sorted({path.rpartition(".")[2] for path in known if not path.rpartition(".")[2].isdigit()})
    return InvalidConfiguration(
        f"{setting}: expected {expected}",
        hint=f"this model has for example: {', '.join(endings[:_SHOWN_NAMES])}",
    )
