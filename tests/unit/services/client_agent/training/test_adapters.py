from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from services.client_agent.adapter import AdapterState
from services.client_agent.config import LoraSection, ModelSection
from services.client_agent.training.adapters import TunedModel, attach
from services.client_agent.training.model import LoadedModel, load_model
from shelora.errors import InvalidConfiguration, RankMismatch, ShapeMismatch, StoredBytesCorrupt
from shelora.lora import Adapter
from support.tiny_models import DECODERS, ENCODERS

LABELS = ("a", "b", "c")
CLASSIFICATION = "sequence-classification"
TOKENS = torch.tensor([[2, 6, 7, 8, 3], [2, 9, 10, 3, 0]])


def load(folder: Path, task: str = CLASSIFICATION) -> LoadedModel:
    section = ModelSection.model_validate({"source": str(folder), "task": task})
    return load_model(section, LABELS if task == CLASSIFICATION else (), "float32")


def tune(folder: Path, task: str = CLASSIFICATION, **lora: Any) -> TunedModel:
    labels = LABELS if task == CLASSIFICATION else ()
    return attach(load(folder, task), LoraSection(**{"rank": 4, **lora}), task, labels)


def random_state(tuned: TunedModel) -> AdapterState:
    generator = np.random.default_rng(3)
    rank = tuned.rank
    modules = tuple(
        Adapter(generator.normal(size=(shape.out_features, rank)), generator.normal(size=(rank, shape.in_features)))
        for shape in tuned.shapes.modules
    )
    return AdapterState(modules, tuple(generator.normal(size=shape.shape) for shape in tuned.shapes.dense))


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.inference_mode():
        return model(input_ids=TOKENS, attention_mask=(TOKENS != 0).long()).logits


def cases() -> list[Any]:
    heads = [(name, CLASSIFICATION) for name in (*ENCODERS, *DECODERS)] + [(name, "causal-lm") for name in DECODERS]
    return [pytest.param(name, task, id=f"{name}-{task}") for name, task in heads]


@pytest.mark.parametrize(("architecture", "task"), cases())
def test_saved_adapters_give_identical_logits_in_plain_peft(
    model_folder: Callable[..., Path], tmp_path: Path, architecture: str, task: str
):
    folder = model_folder(architecture, "" if task == CLASSIFICATION else "causal-lm")
    tuned = tune(folder, task, alpha=6.0)
    state = random_state(tuned)
    tuned.write(state)
    expected = logits(tuned.peft)
    tuned.save(tmp_path / "adapter", state)
    torch.manual_seed(99)
    base: Any
    if task == CLASSIFICATION:
        base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
        base.config.pad_token_id = tuned.peft.config.pad_token_id
    else:
        base = AutoModelForCausalLM.from_pretrained(folder)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(logits(loaded), expected)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "gpt2"])
def test_the_saved_files_are_those_of_peft(model_folder: Callable[..., Path], tmp_path: Path, architecture: str):
    tuned = tune(model_folder(architecture))
    tuned.save(tmp_path / "ours", tuned.read())
    tuned.peft.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    settings = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    for setting in settings:
        setting["target_modules"].sort()  # PEFT keeps them as a set
    assert settings[0] == settings[1]
    assert json.loads((tmp_path / "ours" / "labels.json").read_text()) == list(LABELS)


def test_shapes_follow_the_model(model_folder: Callable[..., Path]):
    shapes = tune(model_folder("gpt2")).shapes
    assert [(module.name, module.out_features, module.in_features) for module in shapes.modules] == [
        ("transformer.h.0.attn.c_attn", 96, 32),
        ("transformer.h.1.attn.c_attn", 96, 32),
    ]
    assert [(tensor.name, tensor.shape) for tensor in shapes.dense] == [("score.weight", (3, 32))]
    dense = tune(model_folder("bert")).shapes.dense
    assert [tensor.name for tensor in dense] == ["classifier.weight", "classifier.bias"]


def test_read_and_write_are_inverse_and_scaling_is_alpha_over_rank(model_folder: Callable[..., Path]):
    tuned = tune(model_folder("llama"), alpha=6.0)
    assert tuned.scaling == 1.5 == tuned.layers[0].scaling["default"]
    state = random_state(tuned)
    tuned.write(state)
    for module, again in zip(state.modules, tuned.read().modules, strict=True):
        np.testing.assert_array_equal(np.float32(module.a), again.a)
        np.testing.assert_array_equal(np.float32(module.b), again.b)
    np.testing.assert_array_equal(np.float32(state.dense[0]), tuned.read().dense[0])
    with pytest.raises(RankMismatch):
        tuned.write(random_state(tune(model_folder("llama"), rank=2)))
    with pytest.raises(ShapeMismatch):
        tuned.write(AdapterState(state.modules, ()))


def test_save_and_load(model_folder: Callable[..., Path], tmp_path: Path):
    tuned = tune(model_folder("distilbert"))
    folder = tmp_path / "adapters" / "round-001"
    tuned.save(folder, random_state(tuned))
    state = tuned.read()
    tuned.save(folder, state)
    again = tuned.load(folder)
    np.testing.assert_array_equal(again.modules[1].b, state.modules[1].b)
    np.testing.assert_array_equal(again.dense[2], state.dense[2])
    assert [entry.name for entry in folder.parent.iterdir()] == ["round-001"]
    with pytest.raises(RankMismatch):
        tune(model_folder("distilbert"), rank=2).load(folder)
    with pytest.raises(StoredBytesCorrupt, match="round-002"):
        tuned.load(tmp_path / "round-002")
    with pytest.raises(StoredBytesCorrupt):
        tune(model_folder("bert")).load(folder)


def test_new_heads_are_drawn_from_the_stream_and_nothing_else_is(model_folder: Callable[..., Path]):
    asked: list[tuple[str, int]] = []

    def stream(name: str, count: int) -> Any:
        asked.append((name, count))
        return np.linspace(0.0, 1.0, count, endpoint=False)

    tuned = tune(model_folder("bert"), target_modules=("query",), modules_to_save=("classifier", "pooler"))
    pooler_weight, pooler_bias, weight, bias = tuned.initial_dense(stream)
    assert asked == [("classifier.weight", 96)]
    stored = load_file(model_folder("bert") / "model.safetensors")
    np.testing.assert_array_equal(pooler_weight, stored["pooler.dense.weight"].double().numpy())
    np.testing.assert_array_equal(pooler_bias, stored["pooler.dense.bias"].double().numpy())
    assert weight.shape == (3, 32)
    assert weight.std() == pytest.approx(0.02, rel=0.02)
    assert weight.mean() == pytest.approx(0.0, abs=1e-3)
    assert not bias.any()


def test_pretrained_values_come_back_after_training(model_folder: Callable[..., Path]):
    tuned = tune(model_folder("roberta", "classification"), modules_to_save=("classifier", "LayerNorm"))
    before = tuned.read().dense
    assert tuned.fresh == frozenset(name for name in HEAD if name.startswith("classifier.out_proj"))
    tuned.write(random_state(tuned))
    initial = tuned.initial_dense(lambda name, count: np.full(count, 0.5))
    for shape, old, new in zip(tuned.shapes.dense, before, initial, strict=True):
        if shape.name in tuned.fresh:
            assert not new.any()
        else:
            np.testing.assert_array_equal(old, new)


HEAD = ("classifier.out_proj.weight", "classifier.out_proj.bias")


def test_new_norms_start_at_one(model_folder: Callable[..., Path], tmp_path: Path):
    folder = Path(shutil.copytree(model_folder("bert"), tmp_path / "partial"))
    from safetensors.torch import save_file

    tensors = load_file(folder / "model.safetensors")
    for kind in ("weight", "bias"):
        del tensors[f"embeddings.LayerNorm.{kind}"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tuned = tune(folder)
    values = dict(zip((s.name for s in tuned.shapes.dense), tuned.initial_dense(lambda _, n: np.zeros(n)), strict=True))
    assert (values["bert.embeddings.LayerNorm.weight"] == 1).all()
    assert (values["bert.embeddings.LayerNorm.bias"] == 0).all()
    with pytest.raises(InvalidConfiguration, match=r"missing are bert.embeddings.LayerNorm.bias"):
        tune(folder, modules_to_save=("classifier",))


def test_settings_that_contradict_the_model_are_refused(model_folder: Callable[..., Path]):
    with pytest.raises(InvalidConfiguration, match=r"lora.rank: expected at most 32 for module bert.*got 33"):
        tune(model_folder("bert"), rank=33)
    with pytest.raises(InvalidConfiguration, match="trained whole"):
        tune(model_folder("roberta"), target_modules=("query", "classifier.dense"))
