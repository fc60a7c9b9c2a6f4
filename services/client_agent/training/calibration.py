"""How strongly each input column of a LoRA module is driven by the local data (docs/method.md, column order)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from services.client_agent.training.batches import Batch
from services.client_agent.training.evaluation import Progress


def activation_norms(
    model: Any, layers: Sequence[Any], batches: Sequence[Callable[[], Batch]], autocast: Any, progress: Progress
) -> tuple[NDArray[np.float64], ...]:
    """2-norms of the input activations of every LoRA module over the given batches, padding excluded.

    Args:
        model: the PEFT model; left in evaluation mode.
        layers: its LoRA layers.
        batches: factories of padded batches, each called once.
        autocast: factory of the context the forward pass runs in.
        progress: called after every batch.

    Returns:
        float64[n] per layer.
    """
    squares: list[torch.Tensor | None] = [None] * len(layers)
    mask: torch.Tensor | None = None

    def collect(index: int, module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        values = inputs[0].detach().double()
        if mask is not None and values.shape[:-1] == mask.shape:
            values = values[mask.bool()]
        total = values.reshape(-1, values.shape[-1]).square().sum(dim=0)
        known = squares[index]
        squares[index] = total if known is None else known + total

    handles = [layer.register_forward_pre_hook(partial(collect, index)) for index, layer in enumerate(layers)]
    model.eval()
    try:
        with torch.inference_mode():
            for done, make in enumerate(batches, start=1):
                batch = make()
                mask = batch.mask
                with autocast():
                    model(**batch.inputs)
                progress(done / len(batches), f"{done} of {len(batches)} batches")
    finally:
        for handle in handles:
            handle.remove()
    return tuple(
        np.zeros(layer.in_features) if total is None else total.sqrt().cpu().numpy()
        for total, layer in zip(squares, layers, strict=True)
    )
