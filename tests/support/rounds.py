"""What an agent of the tests does in each phase, over the wire."""

from __future__ import annotations

import safetensors.numpy

from services.client_agent.round import AveragedUpdate, open_average
from services.common.codec import plan_from_proto
from shelora.v1 import aggregator_pb2 as wire
from support.aggregator import Member, upload_header
from support.updates import Contribution, open_residues, orders

BUDGETS = {"agent-1": (2, (10, 6)), "agent-2": (4, (40, 25)), "agent-3": (3, (10, 25))}
"""Rank and encrypted columns of the three agents."""


async def send_sensitivities(agent: Member, payload: bytes) -> None:
    """Take part in the negotiation."""
    view = await agent.until(wire.AGENT_TASK_NEGOTIATE)
    await agent.upload(upload_header(view, wire.PAYLOAD_KIND_SENSITIVITY, payload), payload)


async def send_factors(agent: Member, contribution: Contribution, number: int) -> None:
    """Upload factors as soon as the round asks for them."""
    view = await agent.until(wire.AGENT_TASK_FACTORS, round_number=number)
    payload = contribution.factors(plan_from_proto(view.plan), number)
    header = upload_header(view, wire.PAYLOAD_KIND_FACTORS, payload, examples=contribution.examples)
    await agent.upload(header, payload)


async def cipher_upload(
    agent: Member, contribution: Contribution, number: int
) -> tuple[wire.UploadHeader, bytes, wire.AgentView]:
    """Wait for the projection and make the ciphertext for it."""
    view = await agent.until(wire.AGENT_TASK_CIPHER, round_number=number)
    header, projection = await agent.download(kind=wire.PAYLOAD_KIND_PROJECTION, round=number)
    plan = plan_from_proto(header.plan)
    ranks = [member.rank for member in header.cohort]
    payload = contribution.ciphertext(plan, ranks, projection, header.weight, number)
    changes = {"layout_digest": header.layout_digest}
    return upload_header(view, wire.PAYLOAD_KIND_CIPHER, payload, **changes), payload, view


async def send_cipher(agent: Member, contribution: Contribution, number: int) -> None:
    """Upload the ciphertext as soon as there is a projection."""
    header, payload, _ = await cipher_upload(agent, contribution, number)
    await agent.upload(header, payload)


def open_published(header: wire.DownloadHeader, average: bytes, cipher: bytes, number: int) -> AveragedUpdate:
    """A published average as an agent opens it."""
    plan = plan_from_proto(header.plan)
    layout = plan.layout([member.rank for member in header.cohort])
    assert header.layout_digest == layout.digest()
    return open_average(
        safetensors.numpy.load(average),
        open_residues(cipher, layout.total_slots),
        orders(plan, number),
        layout,
        header.first_plain,
        header.total_weight,
    )
