"""Agents that speak the protocol with the product's own connection but train nothing and hold no keys.

Factors are small random matrices, ciphertexts random residues below the modulus: the aggregator cannot tell the
difference, and the sizes are those of real adapters.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import safetensors.numpy

from bench.aggregator.stage import FEDERATION, Server, Stage
from services.client_agent.connection import Connection
from services.client_agent.domain import PayloadKind, Registration, Signature, Upload, View
from services.common.digests import digest_of_file
from services.common.identity import Role
from services.operators.client import FederationClient
from services.operators.domain import FederationSpec
from shelora.errors import PeerUnreachable
from shelora.he.parameters import CkksParameters
from shelora.plan import ModelShapes, ModuleShape
from shelora.rounds.phases import AgentTask

PARAMETERS: Final = CkksParameters(modulus=2**60 - 2**14 + 1)
"""The set the product makes: ring dimension 4096, one 60-bit modulus."""

_RANK: Final = 16
_WIDTH: Final = 4096
_OUTPUTS: Final = 64
_BLOCKS_PER_MODULE: Final = _RANK * _WIDTH // 4096
_LONG_S: Final = 24 * 3600


@dataclass(frozen=True)
class Workload:
    """What every agent sends in a round.

    Attributes:
        modules: LoRA modules of 64 x 4096; each fills 16 blocks (1 MiB) of ciphertext with rank and cap of 16.
        hidden: encrypted columns of every module; all unless fewer are named.
    """

    modules: int
    hidden: int = _WIDTH

    @property
    def shapes(self) -> ModelShapes:
        modules = (ModuleShape(f"layer.{index}", _OUTPUTS, _WIDTH) for index in range(self.modules))
        return ModelShapes(tuple(modules), ())

    @property
    def columns(self) -> tuple[int, ...]:
        return (self.hidden,) * self.modules

    @property
    def blocks(self) -> int:
        return -(-self.modules * _RANK * self.hidden // PARAMETERS.values_per_block)

    @property
    def cipher_bytes(self) -> int:
        return self.blocks * PARAMETERS.block_bytes

    @property
    def factors_bytes(self) -> int:
        return 4 * self.modules * _RANK * (_OUTPUTS + _WIDTH - self.hidden)

    def write(self, folder: Path, seed: int = 0) -> tuple[Path, Path]:
        """Files of factors and ciphertext."""
        rng = np.random.default_rng(seed)
        tensors = {}
        for index in range(self.modules):
            tensors[f"{index}.left"] = rng.normal(size=(_OUTPUTS, _RANK)).astype(np.float32)
            right = np.zeros((_RANK, _WIDTH - self.hidden), dtype=np.float32)
            np.fill_diagonal(right, 1.0)
            tensors[f"{index}.right"] = right
        folder.mkdir(parents=True, exist_ok=True)
        factors, cipher = folder / f"factors-{seed}", folder / f"cipher-{seed}"
        factors.write_bytes(safetensors.numpy.save(tensors))
        with cipher.open("wb") as file:
            for _ in range(self.blocks):
                block = rng.integers(0, PARAMETERS.modulus, PARAMETERS.block_bytes // 8, dtype=np.uint64)
                file.write(block.tobytes())
        return factors, cipher


class SyntheticAgent:
    """One agent of a federation.

    Args:
        connection: the product's, open.
        workload: what to send.
        factors: file of the factors payload.
        cipher: file of the ciphertext.
    """

    def __init__(self, connection: Connection, workload: Workload, factors: Path, cipher: Path) -> None:
        self.connection = connection
        self._workload = workload
        self._factors = factors
        self._cipher = cipher
        self._view: View | None = None
        self._changed = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None

    @property
    def selective(self) -> bool:
        """Whether columns are sent in the clear, so that the agents have to agree on an order."""
        return self._workload.hidden < _WIDTH

    async def _register(self) -> None:
        signature = Signature(self._workload.shapes, bytes(32), bytes(32), "SEQ_CLS")
        digest = PARAMETERS.digest()
        await self.connection.register(
            Registration(_RANK, self._workload.columns, "full", signature, 1, digest, examples=100)
        )

    async def __aenter__(self) -> SyntheticAgent:
        """Join the federation and listen like a real agent, until the context ends."""
        await self._register()
        self._watching = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop listening."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)

    async def until(self, task: AgentTask, round_number: int) -> View:
        """Wait for what the aggregator asks for in a round, 0 for any."""
        return await self._seen(
            lambda view: view.task is task and round_number in (0, view.round) and view.plan is not None
        )

    async def published(self, round_number: int) -> None:
        """Wait until a round is published."""
        await self._seen(lambda view: view.last_published_round >= round_number)

    async def negotiate(self, folder: Path) -> None:
        """Send sensitivities, one value a column; asked for when not everything is encrypted."""
        view = await self.until(AgentTask.NEGOTIATE, 0)
        assert view.plan is not None  # until() has seen to it
        blocks = -(-self._workload.modules * _WIDTH // PARAMETERS.values_per_block)
        path = folder / f"sensitivity-{self.connection.name}"
        path.write_bytes(bytes(blocks * PARAMETERS.block_bytes))
        await self.connection.upload(Upload(PayloadKind.SENSITIVITY, path, 0, view.plan), silent)
        path.unlink()

    async def factors(self, round_number: int) -> Upload:
        """The factors to send in a round."""
        view = await self.until(AgentTask.FACTORS, round_number)
        assert view.plan is not None  # until() has seen to it
        return Upload(PayloadKind.FACTORS, self._factors, round_number, view.plan, examples=100)

    async def cipher(self, round_number: int, folder: Path) -> Upload:
        """The ciphertext to send in a round, once there is a projection."""
        view = await self.until(AgentTask.CIPHER, round_number)
        assert view.plan is not None  # until() has seen to it
        target = folder / f"projection-{self.connection.name}"
        received = await self.connection.download(PayloadKind.PROJECTION, target, silent, round_number=round_number)
        target.unlink()
        digest = digest_of_file(self._cipher)
        return Upload(PayloadKind.CIPHER, self._cipher, round_number, view.plan, received.layout_digest, digest=digest)

    async def _watch(self) -> None:
        try:
            async with contextlib.aclosing(self.connection.watch()) as views:
                async for view in views:
                    self._view = view
                    self._tell()
            raise PeerUnreachable("the view stream ended")
        finally:
            self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _seen(self, wanted: Callable[[View], bool]) -> View:
        while self._view is None or not wanted(self._view):
            changed = self._changed
            if self._watching is None or self._watching.done():
                raise RuntimeError("nobody listens to the aggregator's views") from _failure(self._watching)
            await changed.wait()
        return self._view


def _failure(task: asyncio.Task[None] | None) -> BaseException | None:
    return None if task is None or task.cancelled() else task.exception()


def silent(_fraction: float, _detail: str) -> None:
    """Reports progress to nobody."""


@contextlib.asynccontextmanager
async def connected(stage: Stage, server: Server, names: Sequence[str]) -> AsyncIterator[list[Connection]]:
    """Connections of the named agents, each with a certificate of its own."""
    async with contextlib.AsyncExitStack() as stack:
        connections = []
        for name in names:
            files = stage.issue(Role.AGENT, name)
            opened = Connection(FEDERATION, server.address, "127.0.0.1:9", files, stage.clock)
            connections.append(await stack.enter_async_context(opened))
        yield connections


@contextlib.asynccontextmanager
async def begun(
    operator: FederationClient, agents: Sequence[SyntheticAgent], rounds: int, folder: Path
) -> AsyncIterator[None]:
    """A federation that everybody has joined; it is started, and the agents have negotiated if need be."""
    spec = FederationSpec(
        federation=FEDERATION,
        rounds=rounds,
        target_agents=len(agents),
        quorum=len(agents),
        epoch=1,
        parameters=PARAMETERS,
        basis_cap=_RANK,
        gather_timeout_s=_LONG_S,
        train_timeout_s=_LONG_S,
        cipher_timeout_s=_LONG_S,
    )
    await operator.create(spec)
    async with contextlib.AsyncExitStack() as stack:
        for agent in agents:
            await stack.enter_async_context(agent)
        await operator.start(FEDERATION)
        if agents[0].selective:
            await asyncio.gather(*(agent.negotiate(folder) for agent in agents))
        yield
