"""Loss and accuracy of a model on sequences, for both tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from services.client_agent.training.batches import Batch, Sequences, by_length, collate

Progress = Callable[[float, str], None]
"""(fraction 0 to 1, short text)"""


@dataclass(frozen=True)
class Evaluation:
    """Figures over a whole test set.

    Attributes:
        accuracy: share of right classes, or of right next tokens for causal-lm.
        loss: mean cross-entropy in nats, per text or per token.
        examples: number of texts.
    """

    accuracy: float
    loss: float
    examples: int


@dataclass(frozen=True)
class Score:
    """Sums over one batch: loss with its gradient, right predictions, predictions."""

    loss: torch.Tensor
    right: torch.Tensor
    count: int


def score(model: Any, batch: Batch, task: str, offset: torch.Tensor | None = None) -> Score:
    """Run the model on a batch; causal-lm counts every token after the first of a row, padding excluded.

    Args:
        model: a PEFT model.
        batch: on the model's device.
        task: "sequence-classification" or "causal-lm".
        offset: float[classes] added to the logits of every text; None adds nothing.
    """
    logits = model(**batch.inputs).logits.float()
    if offset is not None:
        logits = logits + offset
    labels = batch.labels
    if task == "causal-lm":
        kept = batch.mask[:, 1:].bool()
        logits, labels = logits[:, :-1][kept], batch.tokens[:, 1:][kept]
    loss = functional.cross_entropy(logits, labels, reduction="sum")
    return Score(loss=loss, right=(logits.argmax(dim=-1) == labels).sum(), count=int(labels.numel()))


def evaluate(
    model: Any, sequences: Sequences, task: str, device: torch.device, autocast: Any, progress: Progress
) -> Evaluation:
    """Evaluate in batches of similar length.

    Args:
        model: a PEFT model; left in evaluation mode.
        sequences: at least one row.
        task: "sequence-classification" or "causal-lm".
        device: where the model is.
        autocast: factory of the context the forward pass runs in.
        progress: called after every batch.
    """
    model.eval()
    loss, right, count, done = 0.0, 0, 0, 0
    with torch.inference_mode():
        for chosen in by_length(sequences):
            with autocast():
                result = score(model, collate(sequences, chosen, device), task)
            loss, right, count = loss + float(result.loss), right + int(result.right), count + result.count
            done += len(chosen)
            progress(done / len(sequences), f"{done} of {len(sequences)} texts")
    return Evaluation(accuracy=right / count, loss=loss / count, examples=len(sequences))
