from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from services.client_agent.config import AgentConfig
from services.common.config import load_config
from shelora.errors import InvalidConfiguration
from shelora.plan import Budget

MINIMAL: dict[str, Any] = {
    "federation": "clinic",
    "aggregator": "127.0.0.1:7443",
    "state_dir": "state",
    "data": {"train": "train.jsonl", "test": "test.csv"},
}


def load(tmp_path: Path, **fields: Any) -> AgentConfig:
    path = tmp_path / "agent.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, **fields}), encoding="utf-8")
    return load_config(AgentConfig, path, environ={})


def test_defaults(tmp_path: Path):
    config = load(tmp_path)
    assert (config.model.source, config.model.task, config.model.labels) == ("embedded", "sequence-classification", ())
    assert (config.lora.rank, config.lora.effective_alpha) == (8, 16.0)
    assert config.encryption.parsed_budget == Budget.full()
    assert config.evaluate
    assert config.exit_when_finished
    assert config.keymanager is None
    assert config.reveal_dir is None
    assert config.control_address == f"unix:{tmp_path}/state/control.sock"


def test_relative_paths_count_from_the_file(tmp_path: Path):
    config = load(
        tmp_path,
        model={"source": "./models/mine"},
        data={"train": "train.jsonl", "test": "owner/texts"},
        enrolment_file="enrolment.json",
        control_listen="unix:run/agent.sock",
        ops_listen="unix:ops.sock",
        reveal_dir="reveal",
    )
    assert config.ops_listen == f"unix:{tmp_path}/ops.sock"
    assert load(tmp_path).ops_listen is None
    assert config.state_dir == tmp_path / "state"
    assert config.model.source == str(tmp_path / "models" / "mine")
    assert config.model.is_folder
    assert config.data.train == str(tmp_path / "train.jsonl")
    assert config.data.test == "owner/texts"
    assert config.enrolment_file == tmp_path / "enrolment.json"
    assert config.reveal_dir == tmp_path / "reveal"
    assert config.control_address == f"unix:{tmp_path}/run/agent.sock"


def test_a_configuration_made_in_code_counts_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    config = AgentConfig.model_validate({**MINIMAL, "model": {"source": "~/model"}})
    assert config.data.train == str(tmp_path / "train.jsonl")
    assert config.model.source == str(Path.home() / "model")
    assert AgentConfig.model_validate({**MINIMAL, "model": {"source": "owner/model"}}).model.source == "owner/model"


def test_the_sent_rank_is_the_rank_unless_it_is_set(tmp_path: Path):
    assert load(tmp_path).lora.effective_sent_rank == 8
    assert load(tmp_path, lora={"rank": 4, "sent_rank": 32}).lora.effective_sent_rank == 32
    assert load(tmp_path, lora={"rank": 4, "sent_rank": 4}).lora.effective_sent_rank == 4


def test_integer_labels_become_text(tmp_path: Path):
    assert load(tmp_path, model={"labels": [0, 1, "other"]}).model.labels == ("0", "1", "other")


def test_environment_overrides(tmp_path: Path):
    path = tmp_path / "agent.yaml"
    path.write_text(yaml.safe_dump(MINIMAL), encoding="utf-8")
    environ = {"SHELORA_AGENT__LORA__RANK": "16", "SHELORA_AGENT__MODEL__LABELS": '["no", "yes"]'}
    config = load_config(AgentConfig, path, environ=environ)
    assert (config.lora.rank, config.model.labels) == (16, ("no", "yes"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"colour": "blue"}, "colour: expected no such field"),
        ({"federation": "No Capitals"}, "federation: federation name: expected 1 to 63 characters"),
        ({"aggregator": "nowhere"}, "aggregator: address: expected host:port"),
        ({"data": {"train": "t.jsonl"}}, "expected data.test while evaluate is true"),
        ({"data": {"train": "t.jsonl", "test": "t.csv", "limit_train": 0}}, "data.limit_train"),
        ({"model": {"labels": ["a", "a"]}}, "expected every label once"),
        ({"model": {"labels": ["a"]}}, "expected at least 2 labels or none"),
        ({"model": {"task": "translation"}}, "model.task"),
        ({"model": {"task": "causal-lm", "source": "./m", "labels": ["a", "b"]}}, "expected no labels for task"),
        ({"model": {"task": "causal-lm"}}, "the embedded model is an encoder"),
        ({"model": {"revision": "main"}}, "a revision belongs to a hub id"),
        ({"lora": {"rank": 0}}, "lora.rank"),
        ({"lora": {"rank": 8, "sent_rank": 7}}, "expected a sent_rank of at least the rank 8, got 7"),
        ({"lora": {"sent_rank": 0}}, "lora.sent_rank"),
        ({"lora": {"alpha": -1}}, "lora.alpha"),
        ({"lora": {"target_modules": []}}, "expected at least one target module"),
        ({"lora": {"modules_to_save": ["score", "score"]}}, "each once"),
        ({"training": {"steps": 1, "epochs": 1}}, "expected steps or epochs"),
        ({"training": {"learning_rate": float("nan")}}, "training.learning_rate"),
        ({"training": {"device": "tpu"}}, "training.device"),
        ({"encryption": {"budget": "plenty"}}, "encryption.budget"),
    ],
)
def test_refusals_name_file_and_field(tmp_path: Path, fields: dict[str, Any], message: str):
    with pytest.raises(InvalidConfiguration) as caught:
        load(tmp_path, **fields)
    assert message in str(caught.value)
    assert str(tmp_path / "agent.yaml") in str(caught.value)


def test_without_evaluation_no_test_data_is_needed(tmp_path: Path):
    assert load(tmp_path, evaluate=False, data={"train": "t.jsonl"}).data.test is None
