"""One way to put code around every kind of gRPC handler."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import grpc

Guard = Callable[["grpc.aio.ServicerContext[Any, Any]"], AbstractAsyncContextManager[None]]
"""Makes the context manager in which one call runs."""


def around(handler: grpc.RpcMethodHandler[Any, Any], guard: Guard) -> grpc.RpcMethodHandler[Any, Any]:
    """The same handler with every call run inside `guard(context)`.

    Args:
        handler: any of the four kinds, with asynchronous behaviour (coroutine functions or asynchronous generators).
        guard: makes one asynchronous context manager a call.

    Returns:
        A handler of the same kind with the same serializers.
    """
    codecs = {
        "request_deserializer": handler.request_deserializer,
        "response_serializer": handler.response_serializer,
    }
    if handler.response_streaming:
        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(_streaming(handler.stream_stream, guard), **codecs)
        return grpc.unary_stream_rpc_method_handler(_streaming(handler.unary_stream, guard), **codecs)
    if handler.request_streaming:
        return grpc.stream_unary_rpc_method_handler(_single(handler.stream_unary, guard), **codecs)
    return grpc.unary_unary_rpc_method_handler(_single(handler.unary_unary, guard), **codecs)


def _single(behaviour: Any, guard: Guard) -> Any:
    async def respond(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        async with guard(context):
            return await behaviour(request, context)

    return respond


def _streaming(behaviour: Any, guard: Guard) -> Any:
    # Writing through the context, not yielding: a cancelled call then ends inside this coroutine, so that the
    # behaviour's generator is closed at once and in the task it ran in.
    async def respond(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        async with guard(context):
            answer = behaviour(request, context)
            if not hasattr(answer, "__aiter__"):
                await answer
                return
            async with contextlib.aclosing(answer) as messages:
                async for message in messages:
                    await context.write(message)

    return respond
