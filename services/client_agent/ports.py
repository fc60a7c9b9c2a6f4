"""What an agent's work needs from outside: a model that trains, and the two services it dials."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from services.client_agent.adapter import AdapterState
from services.client_agent.domain import PayloadKind, Received, Registration, Signature, Terms, Upload, View
from services.client_agent.progress import Report
from services.common.keymanager_client import FetchedEpoch
from shelora.lora import Factors

Float64 = npt.NDArray[np.float64]


class Evaluation(Protocol):
    """Quality of the loaded adapter on the agent's test data."""

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 to 1."""

    @property
    def loss(self) -> float:
        """Mean loss."""

    @property
    def examples(self) -> int:
        """Number of examples (tokens for language models) behind the figures."""


class Trainer(Protocol):
    """A base model with LoRA adapters and the agent's data. Calls block and are made from one thread at a time."""

    @property
    def signature(self) -> Signature:
        """What the model is."""

    @property
    def examples(self) -> int:
        """Training examples."""

    @property
    def rank(self) -> int:
        """LoRA rank."""

    @property
    def scaling(self) -> float:
        """LoRA scaling alpha / r."""

    @property
    def sent_rank(self) -> int:
        """Rank of what is sent; the LoRA rank unless a residual is kept."""

    def initial_dense(self, stream: Callable[[str, int], Float64]) -> tuple[Float64, ...]:
        """Dense tensors at the start; fresh ones come from `stream(name, count)`, uniform in [0, 1)."""

    def activation_norms(self, report: Report) -> tuple[Float64, ...]:
        """2-norm of every module's input columns over the calibration batches, float64[n]."""

    def set_adapter(self, state: AdapterState) -> None:
        """Load an adapter of this trainer's rank."""

    def get_adapter(self) -> AdapterState:
        """The adapter as it is now, without a residual."""

    def set_residual(self, residual: Sequence[Factors] | None) -> None:
        """Keep left @ right of every module in its frozen weights, instead of what was kept there; None: nothing."""

    def train(self, round_number: int, report: Report, should_stop: Callable[[], bool]) -> dict[str, float]:
        """Train on local data; deterministic for one seed and round. Figures: loss, steps, seconds."""

    def evaluate(self, report: Report) -> Evaluation:
        """Quality on the agent's test data."""

    def save_adapter(self, folder: Path, state: AdapterState) -> None:
        """Write a PEFT adapter, whole or not at all."""


class Aggregator(Protocol):
    """The aggregator, as one agent sees it. Calls raise SheLoraErrors; transient failures are retried."""

    async def terms(self) -> Terms:
        """What to know before registering."""

    async def register(self, registration: Registration) -> View:
        """Register or register again."""

    def watch(self) -> AsyncGenerator[View, None]:
        """The agent's view now and after every change; ends or raises PeerUnreachable when the stream breaks."""

    async def upload(self, upload: Upload, report: Report) -> int:
        """Send a payload to the end, resuming where it stopped; returns its bytes."""

    async def download(
        self, kind: PayloadKind, path: Path, report: Report, *, round_number: int = 0, plan_version: int = 0
    ) -> Received:
        """Fetch and verify a payload into a file, resuming a partial one."""

    async def report_round(self, round_number: int, metrics: Mapping[str, float]) -> None:
        """Report figures."""

    async def leave_round(self, round_number: int, reason: str) -> None:
        """Give up a round."""


class Membership(Aggregator, Protocol):
    """An enrolled agent's connection to both services; an async context manager."""

    @property
    def name(self) -> str:
        """The agent's name in its certificate."""

    async def fetch_epoch(self, number: int, hpke_public_key: bytes) -> FetchedEpoch:
        """A key epoch with its sealed secrets."""

    async def __aenter__(self) -> Membership:
        """Begin to keep the certificate fresh."""

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the channels."""
