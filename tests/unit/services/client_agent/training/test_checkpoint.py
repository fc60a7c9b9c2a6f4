from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from services.client_agent.config import ModelSection
from services.client_agent.training.checkpoint import digest_model, digest_tokenizer, locate
from shelora.errors import InvalidConfiguration


@pytest.fixture
def copied(model_folder: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder("bert"), tmp_path / "copy"))


def test_the_digest_sees_values_and_settings(copied: Path, model_folder: Callable[..., Path]):
    original = digest_model(model_folder("bert"))
    assert digest_model(copied) == original
    assert len(original) == 32
    tensors = load_file(copied / "model.safetensors")
    tensors["pooler.dense.bias"][0] += 1e-6
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    changed = digest_model(copied)
    assert changed != original
    settings = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**settings, "layer_norm_eps": 1e-5}))
    assert digest_model(copied) not in (original, changed)


def test_the_digest_ignores_how_a_model_was_saved(copied: Path, model_folder: Callable[..., Path]):
    tensors = load_file(copied / "model.safetensors")
    names = sorted(tensors)
    (copied / "model.safetensors").unlink()
    for number, part in enumerate((names[:5], names[5:]), start=1):
        save_file({name: tensors[name] for name in part}, copied / f"model-{number}-of-2.safetensors")
    settings = json.loads((copied / "config.json").read_text())
    settings.update(transformers_version="4.0.0", architectures=["Other"], id2label={"0": "no", "1": "yes"})
    (copied / "config.json").write_text(json.dumps(settings, indent=4))
    assert digest_model(copied) == digest_model(model_folder("bert"))


def test_broken_weights_are_refused(copied: Path):
    weights = copied / "model.safetensors"
    data = weights.read_bytes()
    for broken in (data[:-10], data[:4], b"\xff" * 64):
        weights.write_bytes(broken)
        with pytest.raises(InvalidConfiguration, match=r"model.source: cannot read the model"):
            digest_model(copied)


def test_the_tokenizer_digest_sees_every_file(copied: Path, model_folder: Callable[..., Path]):
    assert digest_tokenizer(copied) == digest_tokenizer(model_folder("bert"))
    settings = copied / "tokenizer_config.json"
    settings.write_text(settings.read_text() + " ")
    assert digest_tokenizer(copied) != digest_tokenizer(model_folder("bert"))
    for path in copied.glob("*token*"):
        path.unlink()
    with pytest.raises(InvalidConfiguration, match="expected tokenizer files"):
        digest_tokenizer(copied)


def test_locate(copied: Path, tmp_path: Path):
    assert locate(ModelSection(source=str(copied))) == copied
    assert (locate(ModelSection()) / "model.safetensors").is_file()
    with pytest.raises(InvalidConfiguration, match=r"expected a folder with config.json"):
        locate(ModelSection(source=str(tmp_path / "none")))
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(InvalidConfiguration, match=r"expected weights in \*.safetensors"):
        locate(ModelSection(source=str(copied)))


def test_a_hub_model_that_cannot_be_had_is_named():
    with pytest.raises(InvalidConfiguration, match="cannot fetch 'owner/never-made' from the model hub"):
        locate(ModelSection(source="owner/never-made"))
    with pytest.raises(InvalidConfiguration, match="cannot fetch 'not a model' from the model hub"):
        locate(ModelSection(source="not a model"))
