"""The client agent's configuration file (agent.yaml): one frozen model a section, unknown fields refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from services.common.config import Address, ServiceConfig
from services.common.identity import check_name
from shelora.errors import SheLoraError
from shelora.plan import Budget, parse_budget

EMBEDDED: Final = "embedded"
"""The model source that stands for the sentence encoder shipped with the agent."""

DATA_SUFFIXES: Final = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
"""File formats that are read without the `datasets` library."""

DEFAULT_STEPS: Final = 30

_PATH_START: Final = re.compile(r"^(/|\./|\.\./|~)|^\.{1,2}$")

Task = Literal["sequence-classification", "causal-lm"]


def _as_label(value: object) -> object:
    """Labels are compared as text; YAML may hold them as integers."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _absolute_path(text: str, info: ValidationInfo) -> str:
    """Relative paths count from the folder that `load_config` passes, else from the working directory."""
    folder = info.context.get("folder", "") if isinstance(info.context, Mapping) else ""
    return str((Path(folder) / Path(text).expanduser()).absolute())


Label = Annotated[str, BeforeValidator(_as_label), Field(min_length=1, max_length=200)]


class ModelSection(ServiceConfig):
    """Which base model is tuned for which task."""

    source: str = Field(default=EMBEDDED, min_length=1)
    """"embedded", a folder (starts with /, ./, ../ or ~), or a hub id."""
    revision: str | None = None
    """Commit, tag or branch of a hub id."""
    task: Task = "sequence-classification"
    labels: tuple[Label, ...] = ()
    """Class names in order; all agents need the same. Empty: collected from the training data."""
    max_tokens: int | None = Field(default=None, ge=2, le=1_000_000)
    """Longer texts are cut; None takes 128, or less if the model holds less."""

    @field_validator("source")
    @classmethod
    def _resolve_source(cls, source: str, info: ValidationInfo) -> str:
        return _absolute_path(source, info) if _PATH_START.match(source) else source

    @field_validator("labels")
    @classmethod
    def _check_labels(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        repeated = sorted({label for label in labels if labels.count(label) > 1})
        if repeated:
            raise ValueError(f"expected every label once, got {repeated} more than once")
        if len(labels) == 1:
            raise ValueError(f"expected at least 2 labels or none, got only {labels[0]!r}")
        return labels

    @model_validator(mode="after")
    def _check_combination(self) -> ModelSection:
        if self.task == "causal-lm" and self.labels:
            raise ValueError("expected no labels for task causal-lm; remove model.labels")
        if self.task == "causal-lm" and self.source == EMBEDDED:
            raise ValueError("the embedded model is an encoder, expected another model.source for task causal-lm")
        if self.revision is not None and (self.source == EMBEDDED or self.is_folder):
            raise ValueError(f"a revision belongs to a hub id, got model.source {self.source!r}")
        return self

    @property
    def is_folder(self) -> bool:
        """Whether the source is a folder of this machine."""
        return _PATH_START.match(self.source) is not None


class DataSection(ServiceConfig):
    """Local texts: files (JSONL, CSV, TSV, Parquet), or names of `datasets` data sets (or `name:configuration`)."""

    train: str = Field(min_length=1)
    test: str | None = Field(default=None, min_length=1)
    text_field: str = Field(default="text", min_length=1)
    label_field: str = Field(default="label", min_length=1)
    """Not read for task causal-lm."""
    limit_train: int | None = Field(default=None, ge=1)
    """Use this many rows, evenly spaced over the file."""
    limit_test: int | None = Field(default=None, ge=1)
    train_split: str = Field(default="train", min_length=1)
    """Split of a `datasets` data set; files have none."""
    test_split: str = Field(default="test", min_length=1)

    @field_validator("train", "test")
    @classmethod
    def _resolve_files(cls, source: str | None, info: ValidationInfo) -> str | None:
        return _absolute_path(source, info) if source is not None and is_data_file(source) else source


class LoraSection(ServiceConfig):
    """The adapter this agent trains. Ranks may differ between agents; targets and saved modules may not."""

    rank: int = Field(default=8, ge=1, le=4096)
    sent_rank: int | None = Field(default=None, ge=1, le=4096)
    """Rank of what is sent; None takes the rank, at least which it is.

    Above the rank, what the adapter cannot hold of the average is kept in the frozen weights while it trains and goes
    into what is sent. To the federation this is an agent of the sent rank; saved adapters stay of the rank.
    """
    alpha: float | None = Field(default=None, gt=0)
    """The update is alpha / rank * B @ A; None takes 2 * rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] | None = None
    """Names (or endings) of linear layers; None takes attention's query, key and value and a classifier's pooler."""
    modules_to_save: tuple[str, ...] | None = None
    """Modules trained whole; None takes the head and whatever the checkpoint does not hold."""

    @field_validator("target_modules", "modules_to_save")
    @classmethod
    def _check_names(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if names is not None and (len(set(names)) != len(names) or not all(names)):
            raise ValueError(f"expected non-empty names, each once, got {list(names)}")
        return names

    @model_validator(mode="after")
    def _check_targets(self) -> LoraSection:
        if self.target_modules == ():
            raise ValueError("expected at least one target module; remove lora.target_modules for the usual ones")
        return self

    @model_validator(mode="after")
    def _check_sent_rank(self) -> LoraSection:
        if self.sent_rank is not None and self.sent_rank < self.rank:
            raise ValueError(f"expected a sent_rank of at least the rank {self.rank}, got {self.sent_rank}")
        return self

    @property
    def effective_sent_rank(self) -> int:
        """Sent rank as it is used."""
        return self.rank if self.sent_rank is None else self.sent_rank

    @property
    def effective_alpha(self) -> float:
        """Alpha as it is used."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


class TrainingSection(ServiceConfig):
    """Local training of one round."""

    steps: int | None = Field(default=None, ge=1, le=1_000_000)
    """Optimizer steps a round; None takes 30 unless epochs are given."""
    epochs: float | None = Field(default=None, gt=0, le=1_000)
    """Passes over the local data a round, instead of steps."""
    batch_size: int = Field(default=16, ge=1, le=65_536)
    learning_rate: float = Field(default=2e-3, gt=0, le=1)
    weight_decay: float = Field(default=0.01, ge=0, le=1)
    warmup: float = Field(default=0.1, ge=0, lt=1)
    """Share of the round's steps in which the learning rate rises from 0."""
    max_gradient_norm: float = Field(default=1.0, gt=0)
    label_balance: float = Field(default=1.0, ge=0, le=1)
    """How evenly a classifier's training draws the local labels: 0 as often as they occur, 1 all equally often.

    Even draws keep agents with few labels from pulling the shared model towards these; where all agents hold labels
    in the same uneven shares, 0 fits better.
    """
    seed: int = Field(default=0, ge=0, lt=2**63)
    threads: int | None = Field(default=None, ge=1, le=1024)
    """CPU threads of the training library; None leaves its own choice."""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    precision: Literal["float32", "bfloat16"] = "float32"
    calibration_batches: int = Field(default=8, ge=1, le=10_000)
    """Batches of local texts that column sensitivity is measured on."""

    @model_validator(mode="after")
    def _check_length(self) -> TrainingSection:
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"expected steps or epochs, got steps {self.steps} and epochs {self.epochs}")
        return self


class EncryptionSection(ServiceConfig):
    """How much this agent encrypts."""

    budget: str = "full"
    """"full", "25%", "20 columns", "auto" or "auto:12s"."""
    threads: int | None = Field(default=None, ge=1, le=1024)
    """CPU threads; None takes one a core."""

    @field_validator("budget")
    @classmethod
    def _check_budget(cls, text: str) -> str:
        try:
            parse_budget(text)
        except SheLoraError as error:
            raise ValueError(str(error)) from error
        return text

    @property
    def parsed_budget(self) -> Budget:
        """The budget as a value."""
        return parse_budget(self.budget)


class AgentConfig(ServiceConfig):
    """The whole file."""

    federation: str
    aggregator: Address
    keymanager: Address | None = None
    """None takes the address in the enrolment file."""
    enrolment_file: Path | None = None
    """Needed until the agent holds a certificate."""
    state_dir: Path
    control_listen: Address | None = None
    """None listens on control.sock in the state folder."""
    ops_listen: Address | None = None
    """HTTP for health and metrics, for example 0.0.0.0:7482 in a container; None, on a device, listens nowhere."""
    model: ModelSection = Field(default_factory=ModelSection)
    data: DataSection
    lora: LoraSection = Field(default_factory=LoraSection)
    training: TrainingSection = Field(default_factory=TrainingSection)
    encryption: EncryptionSection = Field(default_factory=EncryptionSection)
    evaluate: bool = True
    """Measure accuracy before and after each average; needs data.test."""
    reveal_dir: Path | None = None
    """For verification only: the agent writes its clear factors here."""
    exit_when_finished: bool = True

    @field_validator("federation")
    @classmethod
    def _check_federation(cls, name: str) -> str:
        try:
            return check_name(name, "federation")
        except SheLoraError as error:
            raise ValueError(str(error)) from error

    @model_validator(mode="after")
    def _check_evaluation(self) -> AgentConfig:
        if self.evaluate and self.data.test is None:
            raise ValueError("expected data.test while evaluate is true; name a test file or set evaluate to false")
        return self

    @property
    def control_address(self) -> str:
        """Where the control API listens."""
        return self.control_listen or f"unix:{self.state_dir / 'control.sock'}"


def is_data_file(source: str) -> bool:
    """Whether a data source names a file rather than a `datasets` data set."""
    return Path(source).suffix.lower() in DATA_SUFFIXES or _PATH_START.match(source) is not None
