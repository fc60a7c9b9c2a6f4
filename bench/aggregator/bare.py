"""A gRPC server that takes uploads and keeps nothing: what the transport alone costs."""

from __future__ import annotations

import argparse
import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, TypeAlias, cast

import grpc

from services.common.lifecycle import announced
from services.common.server import LOOKAHEAD, OPTIONS, WINDOW_BYTES, listen
from services.common.tls import IdentityFiles, server_credentials
from shelora.v1 import aggregator_pb2

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


async def throw_away(messages: AsyncIterator[aggregator_pb2.UploadRequest], context: Context) -> Any:
    """Take every message and do nothing with it."""
    await context.send_initial_metadata(())
    async for _ in messages:
        pass
    return aggregator_pb2.UploadResponse()


def handlers() -> grpc.GenericRpcHandler:
    """The call of an upload."""
    methods: dict[str, Any] = {
        "Upload": grpc.stream_unary_rpc_method_handler(
            cast("Any", throw_away),
            request_deserializer=aggregator_pb2.UploadRequest.FromString,
            response_serializer=aggregator_pb2.UploadResponse.SerializeToString,
        ),
    }
    return grpc.method_handlers_generic_handler("shelora.v1.RoundService", methods)


async def serve(identity: Path, ready_file: Path) -> None:
    """Serve on a free port until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    server = grpc.aio.server(options=(*OPTIONS, (LOOKAHEAD, WINDOW_BYTES)))
    server.add_generic_rpc_handlers((handlers(),))
    port = await listen(server, "127.0.0.1:0", server_credentials(IdentityFiles(identity), require_client=True))
    with announced(ready_file, {"grpc": port}):
        await stop.wait()
    await server.stop(1.0)


def main() -> None:
    """Command line: where the identity is and where to announce the port."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--identity", type=Path, required=True)
    parser.add_argument("--ready-file", type=Path, required=True)
    arguments = parser.parse_args()
    asyncio.run(serve(arguments.identity, arguments.ready_file))


if __name__ == "__main__":
    main()
