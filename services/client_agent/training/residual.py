"""The frozen weights under LoRA pairs, with a residual of the average in them or without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch

from services.client_agent.adapter import check_residual
from shelora.errors import InvalidConfiguration
from shelora.lora import Factors
from shelora.plan import ModelShapes

_ADDABLE: Final = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


class FrozenWeights:
    """Weights of the base layers of a model's LoRA modules.

    A residual goes into copies that stand in for the weights, which are set aside untouched. So nothing is rounded
    twice, what else uses the same weight (a tied embedding) sees the old one, and taking the residual away is exact.
    """

    def __init__(self, shapes: ModelShapes, layers: Sequence[Any]) -> None:
        """Take the LoRA layers of all modules, in order."""
        self._shapes, self._layers = shapes, tuple(layers)
        self._originals: tuple[torch.nn.Parameter, ...] | None = None

    def check(self) -> None:
        """Refuse weights that nothing can be added to.

        Raises:
            InvalidConfiguration: weights that are quantised or of another kind; names the module.
        """
        for shape, layer in zip(self._shapes.modules, self._layers, strict=True):
            weight = layer.get_base_layer().weight
            stored = (shape.out_features, shape.in_features)
            if weight.dtype not in _ADDABLE or tuple(weight.shape) != (stored[::-1] if _transposed(layer) else stored):
                raise InvalidConfiguration(
                    f"lora.sent_rank: module {shape.name}: expected floating-point weights of {stored} to add to, "
                    f"got {weight.dtype} of shape {tuple(weight.shape)}",
                    hint="load the base model unquantised, or leave lora.sent_rank out",
                )

    def keep(self, residual: Sequence[Factors] | None) -> None:
        """Add left @ right to every weight, instead of what was added before; None or nothing restores the weights.

        The sum is formed in float64 and rounded once, to the weight's own type.

        Args:
            residual: left float64[m, p] and right float64[p, n] per module.

        Raises:
            InvalidConfiguration: weights that are quantised or of another kind.
            ShapeMismatch, NonFiniteValue: the residual belongs to another model.
        """
        check_residual(residual or (), self._shapes)
        self._restore()
        if not residual:
            return
        self.check()
        bases = [layer.get_base_layer() for layer in self._layers]
        self._originals = tuple(base.weight for base in bases)
        for layer, base, kept in zip(self._layers, bases, residual, strict=True):
            added = torch.from_numpy(kept.left @ kept.right)
            weight = base.weight.detach()
            total = (weight.double() + (added.T if _transposed(layer) else added).to(weight.device)).to(weight.dtype)
            base.weight = torch.nn.Parameter(total.contiguous(), requires_grad=False)

    def _restore(self) -> None:
        if self._originals is not None:
            for layer, original in zip(self._layers, self._originals, strict=True):
                layer.get_base_layer().weight = original
            self._originals = None


def _transposed(layer: Any) -> bool:
    """Whether the weight is stored as (in, out)."""
    return bool(layer.fan_in_fan_out)
