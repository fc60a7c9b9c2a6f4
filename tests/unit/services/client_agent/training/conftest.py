"""Fixtures on tiny random models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from services.client_agent.config import AgentConfig
from support.tiny_models import sample_rows, save_model, write_jsonl


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """architecture, head -> folder with such a model, made once."""
    made: dict[tuple[str, str], Path] = {}

    def make(architecture: str, head: str = "") -> Path:
        key = (architecture, head)
        if key not in made:
            made[key] = save_model(tmp_path_factory.mktemp(f"{architecture}-{head or 'bare'}"), architecture, head)
        return made[key]

    return make


@pytest.fixture
def agent_config(tmp_path: Path) -> Callable[..., AgentConfig]:
    """Configuration on sample data; keywords replace fields of the sections of that name."""
    train = write_jsonl(tmp_path / "train.jsonl", sample_rows(24))
    test = write_jsonl(tmp_path / "test.jsonl", sample_rows(10))

    def make(source: Path | str, task: str = "sequence-classification", **sections: dict[str, Any]) -> AgentConfig:
        fields: dict[str, Any] = {
            "federation": "tiny",
            "aggregator": "127.0.0.1:1",
            "state_dir": tmp_path / "state",
            "model": {"source": str(source), "task": task},
            "data": {"train": str(train), "test": str(test)},
            "evaluate": sections.get("data", {}).get("test", "") is not None,
            "lora": {"rank": 4},
            "training": {"steps": 4, "batch_size": 4, "threads": 1, "device": "cpu"},
        }
        for section, values in sections.items():
            fields[section] = {**fields.get(section, {}), **values}
        return AgentConfig.model_validate(fields)

    return make
