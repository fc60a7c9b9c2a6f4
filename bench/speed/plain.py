"""Plaintext federated averaging of A and B over the same gRPC, TLS and chunks: what privacy is priced against.

No database, no disk, no resumption, no plan: as little as averaging can be. Ranks have to be equal.

    python -m bench.speed.plain --config aggregator.yaml --agents 4 --ready-file ready.json
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np
import numpy.typing as npt

from services.aggregator.config import AggregatorConfig
from services.client_agent.adapter import AdapterState
from services.client_agent.config import AgentConfig
from services.client_agent.connection import connect
from services.client_agent.state import AgentState
from services.common.channel import open_channel
from services.common.chunk_codec import reader, serialize
from services.common.clock import SystemClock
from services.common.config import load_config
from services.common.enrolment import ensure_identity
from services.common.lifecycle import announced, run_until_signalled
from services.common.server import GrpcServer
from services.common.tls import IdentityFiles, channel_credentials, server_credentials
from services.common.transfer import Piece, check_piece, pieces
from shelora.lora import Adapter
from shelora.v1 import aggregator_pb2

_SERVICE: Final = "bench.PlainAveraging"
_AVERAGE: Final = "Average"
_read: Final = reader(aggregator_pb2.UploadRequest)
Float32 = npt.NDArray[np.float32]


class PlainAverage:
    """Means of float32 vectors, one for each full set of senders; every call is answered with its set's mean."""

    def __init__(self, agents: int) -> None:
        self._agents = agents
        self._begin()

    def _begin(self) -> None:
        self._total: npt.NDArray[np.float64] | None = None
        self._senders = 0
        self._mean: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def average(self, requests: AsyncIterator[Piece], _context: Any) -> AsyncIterator[Piece]:
        """One agent's vector in, the mean of all out."""
        payload = bytearray()
        async for piece in requests:
            payload += check_piece(piece, len(payload))
        vector = np.frombuffer(payload, dtype=np.float32)
        self._total = vector.astype(np.float64) if self._total is None else self._total + vector
        self._senders += 1
        mean = self._mean
        if self._senders == self._agents:
            mean.set_result((self._total / self._agents).astype(np.float32).tobytes())
            self._begin()
        for piece in pieces(await mean):
            yield piece


class PlainAgent:
    """Trains and averages in the clear."""

    def __init__(self, address: str, files: IdentityFiles, trainer: Any) -> None:
        self._address, self._files, self._trainer = address, files, trainer

    @classmethod
    async def connect(cls, config: AgentConfig, trainer: Any) -> PlainAgent:
        """Enrol as the product's agent does."""
        state = AgentState(config.state_dir)
        async with await connect(config, state, SystemClock()):
            pass
        return cls(config.aggregator, IdentityFiles(state.identity), trainer)

    async def run(self, rounds: int) -> AsyncIterator[tuple[int, dict[str, float]]]:
        """Train, send, take the mean.

        Yields:
            The round's number and bytes_up, bytes_down, once its mean is applied.
        """
        state = self._start()
        async with open_channel(self._address, channel_credentials(self._files)) as channel:
            average: Any = channel.stream_stream(
                f"/{_SERVICE}/{_AVERAGE}",
                request_serializer=serialize,
                response_deserializer=_read,
            )
            for number in range(1, rounds + 1):
                self._trainer.set_adapter(state)
                await asyncio.to_thread(self._trainer.train, number, lambda _share, _text: None, lambda: False)
                state = self._trainer.get_adapter()
                sent = pack(state)
                received = bytearray()
                async for piece in average(pieces(sent), wait_for_ready=True):
                    received += check_piece(piece, len(received))
                state = unpack(np.frombuffer(received, dtype=np.float32), state)
                self._trainer.set_adapter(state)
                folder = self._files.folder.parent / "adapters" / f"round-{number:03d}"
                await asyncio.to_thread(self._trainer.save_adapter, folder, state)
                yield number, {"bytes_up": float(len(sent)), "bytes_down": float(len(received))}

    def _start(self) -> AdapterState:
        """Equal everywhere: A drawn from a fixed seed, B zero."""
        rng = np.random.default_rng(0)
        shapes, rank = self._trainer.signature.shapes, self._trainer.rank
        modules = tuple(
            Adapter(np.zeros((shape.out_features, rank)), rng.uniform(-1, 1, (rank, shape.in_features)) / np.sqrt(rank))
            for shape in shapes.modules
        )
        return AdapterState(modules, self._trainer.initial_dense(lambda _name, count: rng.uniform(size=count)))


def pack(state: AdapterState) -> bytes:
    """All weights as one float32 vector."""
    arrays = [array for module in state.modules for array in (module.b, module.a)]
    return b"".join(np.asarray(array, dtype=np.float32).tobytes() for array in (*arrays, *state.dense))


def unpack(vector: Float32, like: AdapterState) -> AdapterState:
    """The inverse of `pack`, with the shapes of another state."""
    at = 0

    def take(shape: tuple[int, ...]) -> Float32:
        nonlocal at
        size = int(np.prod(shape))
        at += size
        return vector[at - size : at].reshape(shape)

    modules = tuple(Adapter(b=take(module.b.shape), a=take(module.a.shape)) for module in like.modules)  # type: ignore[arg-type]  # float32 is enough for a model
    return AdapterState(modules, tuple(take(tensor.shape).astype(np.float64) for tensor in like.dense))


async def serve(config: AggregatorConfig, agents: int, ready_file: Path, stop: asyncio.Event) -> None:
    """Average until stopped, under the aggregator's identity."""
    files = await ensure_identity(config.identity, config.enrolment_file, SystemClock())
    averaging = PlainAverage(agents)
    handler = grpc.stream_stream_rpc_method_handler(
        averaging.average,
        request_deserializer=_read,
        response_serializer=serialize,
    )
    generic = grpc.method_handlers_generic_handler(_SERVICE, {_AVERAGE: handler})
    credentials = server_credentials(files, require_client=True)
    server = GrpcServer(config.listen, credentials, lambda target: target.add_generic_rpc_handlers([generic]))
    with announced(ready_file, {"grpc": await server.start()}):
        await stop.wait()
    await server.drain(0)


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--agents", type=int, required=True)
    parser.add_argument("--ready-file", type=Path, required=True)
    options = parser.parse_args()
    config = load_config(AggregatorConfig, options.config, service="aggregator")
    run_until_signalled(lambda stop: serve(config, options.agents, options.ready_file, stop))


if __name__ == "__main__":
    main()
