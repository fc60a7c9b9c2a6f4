from __future__ import annotations

import asyncio
import time
from typing import Any, cast

import grpc
import pytest
from google.protobuf.descriptor_pool import Default
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client import CollectorRegistry

from services.common import channel as channel_module
from services.common.channel import call, open_channel, receive_stream
from services.common.grpc_errors import ErrorInterceptor
from services.common.metrics import RpcMetricsInterceptor
from services.common.server import GrpcServer
from shelora.errors import InvalidConfiguration, PeerUnreachable, WrongPhase
from shelora.v1 import agent_pb2, agent_pb2_grpc, aggregator_pb2, keymanager_pb2

FILES = (agent_pb2, aggregator_pb2, keymanager_pb2)


class Control(agent_pb2_grpc.AgentControlServiceServicer):
    """A small real service of the contract."""

    def __init__(self) -> None:
        self.running = asyncio.Event()
        self.finish = asyncio.Event()

    async def GetStatus(self, request: Any, context: Any) -> agent_pb2.GetStatusResponse:  # noqa: N802 - the contract's name
        return agent_pb2.GetStatusResponse(status=agent_pb2.AgentStatus(name="agent-1"))

    async def Pause(self, request: Any, context: Any) -> agent_pb2.PauseResponse:  # noqa: N802 - the contract's name
        self.running.set()
        await self.finish.wait()
        return agent_pb2.PauseResponse()

    async def Start(self, request: Any, context: Any) -> agent_pb2.StartResponse:  # noqa: N802 - the contract's name
        return agent_pb2.StartResponse()

    async def ExportAdapter(self, request: Any, context: Any) -> agent_pb2.ExportAdapterResponse:  # noqa: N802 - as above
        return agent_pb2.ExportAdapterResponse(folder=request.folder)

    async def WatchProgress(self, request: Any, context: Any) -> Any:  # noqa: N802 - the contract's name
        yield agent_pb2.WatchProgressResponse(fraction=1.0)

    async def Stop(self, request: Any, context: Any) -> agent_pb2.StopResponse:  # noqa: N802 - the contract's name
        raise WrongPhase("expected a running round, got none")

    def register(self, server: grpc.aio.Server) -> None:
        agent_pb2_grpc.add_AgentControlServiceServicer_to_server(self, server)


async def test_health_and_reflection_tell_what_is_served() -> None:
    server = GrpcServer("127.0.0.1:0", None, Control().register)
    port = await server.start()
    async with open_channel(f"127.0.0.1:{port}", None) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        for name in ("", "shelora.v1.AgentControlService"):
            answer = await call(health.Check, health_pb2.HealthCheckRequest(service=name), timeout_s=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(cast("Any", channel))

        async def requests() -> Any:
            yield reflection_pb2.ServerReflectionRequest(list_services="")

        answers = [answer async for answer in stub.ServerReflectionInfo(requests(), timeout=10)]
        listed = {service.name for service in answers[0].list_services_response.service}
        assert {"shelora.v1.AgentControlService", "grpc.health.v1.Health"} <= listed
    await server.drain(0)


async def test_draining_says_not_serving_lets_calls_finish_and_refuses_new_ones() -> None:
    control = Control()
    server = GrpcServer("127.0.0.1:0", None, control.register)
    port = await server.start()
    async with open_channel(f"127.0.0.1:{port}", None) as channel:
        health_stub: Any = health_pb2_grpc.HealthStub(channel)
        health = receive_stream(health_stub.Watch, health_pb2.HealthCheckRequest(service=""), timeout_s=30)
        assert (await anext(health)).status == health_pb2.HealthCheckResponse.SERVING
        stub = agent_pb2_grpc.AgentControlServiceStub(channel)
        running = asyncio.create_task(call(stub.Pause, agent_pb2.PauseRequest(), timeout_s=30))
        await control.running.wait()
        assert not server.draining.is_set()
        drained = asyncio.create_task(server.drain(20))
        assert (await anext(health)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert server.draining.is_set()
        await health.aclose()
        control.finish.set()
        assert await running == agent_pb2.PauseResponse()
        await drained
        with pytest.raises(PeerUnreachable):
            await call(stub.Pause, agent_pb2.PauseRequest(), timeout_s=10)
    await server.drain(0)


async def test_calls_that_outlast_the_grace_are_cancelled() -> None:
    control = Control()
    server = GrpcServer("127.0.0.1:0", None, control.register)
    port = await server.start()
    async with open_channel(f"127.0.0.1:{port}", None) as channel:
        stub = agent_pb2_grpc.AgentControlServiceStub(channel)
        running = asyncio.create_task(call(stub.Pause, agent_pb2.PauseRequest(), timeout_s=30))
        await control.running.wait()
        await server.drain(0.1)
        with pytest.raises(PeerUnreachable):
            await running


async def test_an_address_in_use_is_refused() -> None:
    server = GrpcServer("127.0.0.1:0", None, Control().register)
    port = await server.start()
    with pytest.raises(InvalidConfiguration, match="expected a free address"):
        await GrpcServer(f"127.0.0.1:{port}", None, Control().register).start()
    await server.drain(0)


async def test_calls_are_measured_with_their_final_status() -> None:
    registry = CollectorRegistry()
    interceptors = [RpcMetricsInterceptor(registry), ErrorInterceptor()]
    server = GrpcServer("127.0.0.1:0", None, Control().register, interceptors)
    port = await server.start()
    async with open_channel(f"127.0.0.1:{port}", None) as channel:
        stub = agent_pb2_grpc.AgentControlServiceStub(channel)
        await call(stub.GetStatus, agent_pb2.GetStatusRequest(), timeout_s=10)
        with pytest.raises(WrongPhase):
            await call(stub.Stop, agent_pb2.StopRequest(), timeout_s=10)
        with pytest.raises(PeerUnreachable, match="deadline"):
            await call(stub.Pause, agent_pb2.PauseRequest(), timeout_s=0.1)
    await server.drain(1)

    def count(method: str, code: str) -> float | None:
        labels = {"method": f"/shelora.v1.AgentControlService/{method}", "code": code}
        return registry.get_sample_value("shelora_rpc_seconds_count", labels)

    assert count("GetStatus", "OK") == 1
    assert count("Stop", "FAILED_PRECONDITION") == 1
    assert count("Pause", "CANCELLED") == 1
    assert registry.get_sample_value("shelora_rpc_running", {"method": "/shelora.v1.AgentControlService/Pause"}) == 0


def test_calls_that_gRPC_repeats_exist_and_ask_once() -> None:  # noqa: N802 - the name of the thing
    assert len(FILES) == 3
    for service, methods in channel_module.IDEMPOTENT.items():
        descriptor = Default().FindServiceByName(service)
        for method in methods:
            found = descriptor.methods_by_name[method]
            assert not found.client_streaming


async def test_an_idempotent_call_is_repeated_when_the_server_comes_back() -> None:
    server = GrpcServer("127.0.0.1:0", None, Control().register)
    port = await server.start()
    async with open_channel(f"127.0.0.1:{port}", None) as channel:
        stub = agent_pb2_grpc.AgentControlServiceStub(channel)
        await call(stub.GetStatus, agent_pb2.GetStatusRequest(), timeout_s=10)
        await server.drain(0)
        second = GrpcServer(f"127.0.0.1:{port}", None, Control().register)
        await second.start()
        answer = await call(stub.GetStatus, agent_pb2.GetStatusRequest(), timeout_s=20)
        assert answer.status.name == "agent-1"
        await second.drain(0)


async def test_calls_wait_for_a_server_that_is_busy() -> None:
    """More of them than the transport would keep by itself; it breaks the others off."""
    calls = 3_500
    server = GrpcServer("127.0.0.1:0", None, Control().register)
    port = await server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = agent_pb2_grpc.AgentControlServiceStub(channel)
        await asyncio.to_thread(stub.GetStatus, agent_pb2.GetStatusRequest())
        pending = [stub.GetStatus.future(agent_pb2.GetStatusRequest()) for _ in range(calls)]
        time.sleep(0.5)  # Nobody looks at them meanwhile.  # noqa: ASYNC251
        codes = await asyncio.to_thread(lambda: {one.code() for one in pending})
        assert codes == {grpc.StatusCode.OK}
    await server.drain(0)
