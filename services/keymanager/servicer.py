"""The gRPC services of the key manager: parse, call, render."""

from __future__ import annotations

from typing import Any

import grpc

from services.common.identity import peer_identity
from services.common.server import Register
from services.common.versions import check_peer_version
from services.keymanager import codec
from services.keymanager.domain import Epoch
from services.keymanager.service import KeyManager
from shelora.v1 import keymanager_pb2 as pb
from shelora.v1 import keymanager_pb2_grpc as pb_grpc

Context = grpc.aio.ServicerContext


def enrolment_service(keymanager: KeyManager) -> Register:
    """Adds the service for callers without a certificate to a server."""
    return lambda server: pb_grpc.add_EnrolmentServiceServicer_to_server(EnrolmentServicer(keymanager), server)


def member_service(keymanager: KeyManager) -> Register:
    """Adds the services for agents and operators to a server."""

    def register(server: grpc.aio.Server) -> None:
        pb_grpc.add_KeyManagerServiceServicer_to_server(KeyManagerServicer(keymanager), server)
        membership_service(keymanager)(server)

    return register


def membership_service(keymanager: KeyManager) -> Register:
    """Adds the service that is all an aggregator needs to a server."""
    return lambda server: pb_grpc.add_MembershipServiceServicer_to_server(MembershipServicer(keymanager), server)


class EnrolmentServicer(pb_grpc.EnrolmentServiceServicer):
    """For callers without a certificate.

    Args:
        keymanager: decides.
    """

    def __init__(self, keymanager: KeyManager) -> None:
        self._keymanager = keymanager

    async def Enrol(self, request: pb.EnrolRequest, context: Context[Any, Any]) -> pb.EnrolResponse:
        check_peer_version(request.version)
        issued = await self._keymanager.enrol(request.federation, request.token, request.csr_der)
        return codec.enrol_response(issued)


class MembershipServicer(pb_grpc.MembershipServiceServicer):
    """For members; who they are comes from the certificate that TLS has verified.

    Args:
        keymanager: decides.
    """

    def __init__(self, keymanager: KeyManager) -> None:
        self._keymanager = keymanager

    async def RenewCertificate(
        self, request: pb.RenewCertificateRequest, context: Context[Any, Any]
    ) -> pb.RenewCertificateResponse:
        return codec.renew_response(await self._keymanager.renew(peer_identity(context), request.csr_der))

    async def ListRevocations(
        self, request: pb.ListRevocationsRequest, context: Context[Any, Any]
    ) -> pb.ListRevocationsResponse:
        revocations = await self._keymanager.revocations(peer_identity(context))
        return pb.ListRevocationsResponse(identities=[revocation.identity.uri for revocation in revocations])


class KeyManagerServicer(pb_grpc.KeyManagerServiceServicer):
    """For agents and operators; who they are comes from the certificate that TLS has verified.

    Args:
        keymanager: decides.
    """

    def __init__(self, keymanager: KeyManager) -> None:
        self._keymanager = keymanager

    async def FetchEpoch(self, request: pb.FetchEpochRequest, context: Context[Any, Any]) -> pb.FetchEpochResponse:
        caller = peer_identity(context)
        epoch, sealed = await self._keymanager.fetch_epoch(caller, request.epoch, request.hpke_public_key)
        return pb.FetchEpochResponse(epoch=self._epoch(epoch), sealed_secrets=sealed)

    async def ListEpochs(self, request: pb.ListEpochsRequest, context: Context[Any, Any]) -> pb.ListEpochsResponse:
        epochs = await self._keymanager.list_epochs(peer_identity(context))
        federation = self._keymanager.federation
        return pb.ListEpochsResponse(
            epochs=[codec.epoch_to_proto(federation, epoch, with_public_key=False) for epoch in epochs]
        )

    async def RotateEpoch(self, request: pb.RotateEpochRequest, context: Context[Any, Any]) -> pb.RotateEpochResponse:
        epoch = await self._keymanager.rotate_epoch(peer_identity(context), request.reason)
        return pb.RotateEpochResponse(epoch=self._epoch(epoch))

    async def RetireEpoch(self, request: pb.RetireEpochRequest, context: Context[Any, Any]) -> pb.RetireEpochResponse:
        epoch = await self._keymanager.retire_epoch(peer_identity(context), request.epoch)
        return pb.RetireEpochResponse(epoch=self._epoch(epoch))

    async def CreateEnrolmentToken(
        self, request: pb.CreateEnrolmentTokenRequest, context: Context[Any, Any]
    ) -> pb.CreateEnrolmentTokenResponse:
        token = await self._keymanager.create_token(
            peer_identity(context),
            codec.role_from_proto(request.role),
            request.name,
            request.ttl_s,
            tuple(request.server_names),
        )
        return codec.token_response(token)

    async def RevokeIdentity(
        self, request: pb.RevokeIdentityRequest, context: Context[Any, Any]
    ) -> pb.RevokeIdentityResponse:
        role = codec.role_from_proto(request.role)
        epoch = await self._keymanager.revoke(peer_identity(context), role, request.name, request.reason)
        return pb.RevokeIdentityResponse(epoch=self._epoch(epoch))

    async def ListAuditRecords(
        self, request: pb.ListAuditRecordsRequest, context: Context[Any, Any]
    ) -> pb.ListAuditRecordsResponse:
        caller = peer_identity(context)
        records = await self._keymanager.audit_records(caller, request.after, request.limit)
        return pb.ListAuditRecordsResponse(records=[codec.record_to_proto(record) for record in records])

    def _epoch(self, epoch: Epoch) -> pb.Epoch:
        return codec.epoch_to_proto(self._keymanager.federation, epoch)
