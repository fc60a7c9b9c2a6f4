"""The key manager as its callers see it: domain values in and out, errors of the tree, no protobuf outside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import grpc
from google.protobuf.message import DecodeError

from services.common.audit import AuditRecord
from services.common.channel import call
from services.common.codec import parameters_from_proto
from services.common.identity import Role
from services.common.sealing import SealingKey, epoch_info, seal
from services.common.versions import check_peer_version, own_version
from shelora.errors import MalformedPayload
from shelora.he.parameters import CkksParameters
from shelora.v1 import keymanager_pb2, keymanager_pb2_grpc

DEADLINE_S: Final = 20.0
"""How long a call to the key manager may take; making the keys of a new epoch takes well under a second."""

EPOCH_STATES: Final[dict[int, str]] = {
    keymanager_pb2.EPOCH_STATE_CURRENT: "current",
    keymanager_pb2.EPOCH_STATE_SUPERSEDED: "superseded",
    keymanager_pb2.EPOCH_STATE_RETIRED: "retired",
}
"""Wire value to the word that `FetchedEpoch.state` holds."""

ROLES: Final[dict[Role, keymanager_pb2.Role.ValueType]] = {
    Role.AGENT: keymanager_pb2.ROLE_AGENT,
    Role.AGGREGATOR: keymanager_pb2.ROLE_AGGREGATOR,
    Role.OPERATOR: keymanager_pb2.ROLE_OPERATOR,
    Role.KEYMANAGER: keymanager_pb2.ROLE_KEYMANAGER,
}
"""Role to its wire value."""


@dataclass(frozen=True)
class FetchedEpoch:
    """A key epoch as the key manager describes it.

    Attributes:
        federation: federation name.
        number: epoch number, from 1.
        state: "current", "superseded" or "retired".
        parameters: the CKKS parameter set.
        public_key: residues of the public key; empty in a list of epochs.
        sealed_secrets: what `open_secrets` opens; empty unless an agent asked with its HPKE key.
        created_at_ms: when the epoch was made.
    """

    federation: str
    number: int
    state: str
    parameters: CkksParameters
    public_key: bytes = field(repr=False)
    sealed_secrets: bytes = field(repr=False)
    created_at_ms: int


@dataclass(frozen=True)
class EnrolledCertificate:
    """A certificate fresh from the key manager.

    Attributes:
        certificate_pem: the certificate.
        authority_pem: the federation's root certificate.
        identity: the identity URI inside the certificate; empty in the answer to a renewal.
        not_after_ms: end of validity.
    """

    certificate_pem: str
    authority_pem: str
    identity: str
    not_after_ms: int


class EnrolmentToken(NamedTuple):
    """A one-time token; it is shown once and stored nowhere in clear.

    Attributes:
        token: the secret text.
        authority_pem: the federation's root certificate, needed to trust the enrolment port.
        expires_at_ms: end of validity.
        keymanager: where the new member reaches the key manager; an aggregator on the membership port.
        enrolment: where the new member enrols.
    """

    token: str
    authority_pem: str
    expires_at_ms: int
    keymanager: str
    enrolment: str

    def __repr__(self) -> str:
        """Show that there is a token, never which."""
        return f"EnrolmentToken(<redacted>, expires_at_ms={self.expires_at_ms})"


def seal_secrets(secret_key: bytes, seed: bytes, hpke_public: bytes, federation: str, epoch: int, agent: str) -> bytes:
    """Seal an epoch's secrets to one agent.

    Args:
        secret_key: residues of the CKKS secret key.
        seed: the federation seed, bytes[32].
        hpke_public: the agent's public key, `SealingKey.public_bytes`.
        federation: federation name; bound, not sent.
        epoch: epoch number; bound, not sent.
        agent: agent name; bound, not sent.

    Raises:
        MalformedPayload: the public key is not valid.
    """
    clear = keymanager_pb2.SealedSecrets(he_secret_key=secret_key, federation_seed=seed)
    return seal(hpke_public, clear.SerializeToString(), epoch_info(federation, epoch, agent))


def open_secrets(sealed: bytes, key: SealingKey, federation: str, epoch: int, agent: str) -> tuple[bytes, bytes]:
    """Open what `seal_secrets` sealed for this key, federation, epoch and agent.

    Returns:
        The CKKS secret key's residues and the federation seed.

    Raises:
        MalformedPayload: sealed for another key or another context, or altered.
    """
    clear = key.open(sealed, epoch_info(federation, epoch, agent))
    try:
        secrets = keymanager_pb2.SealedSecrets.FromString(clear)
    except DecodeError as error:
        raise MalformedPayload(
            "sealed secrets: expected a SealedSecrets message, got other bytes",
            hint="install the same release on the key manager and on this machine",
        ) from error
    return secrets.he_secret_key, secrets.federation_seed


async def enrol(
    channel: grpc.aio.Channel, federation: str, token: str, csr_der: bytes, *, deadline_s: float = DEADLINE_S
) -> EnrolledCertificate:
    """Exchange a token and a signing request for a certificate; safe to repeat with the same key.

    Args:
        channel: to the enrolment port, without a client certificate.
        federation: federation name.
        token: the one-time token.
        csr_der: PKCS#10 request in DER.
        deadline_s: how long to wait.

    Raises:
        InvalidToken: unknown, expired, or used with another key.
        AgentRevoked: the identity was revoked.
        VersionMismatch: the key manager speaks another protocol.
        PeerUnreachable: no answer in time.
    """
    stub = keymanager_pb2_grpc.EnrolmentServiceStub(channel)
    request = keymanager_pb2.EnrolRequest(federation=federation, token=token, csr_der=csr_der, version=own_version())
    response = await call(stub.Enrol, request, timeout_s=deadline_s)
    check_peer_version(response.version)
    return EnrolledCertificate(
        response.certificate_pem, response.authority_pem, response.identity, response.not_after_ms
    )


class KeyManagerClient:
    """Calls to the key manager under the channel's certificate; its role decides what is allowed.

    Every method raises the errors of the tree that the key manager raised, or PeerUnreachable.

    Args:
        channel: mutual TLS channel to the key manager, stays the caller's to close. On the membership port only
            `renew_certificate` and `revocations` are served.
        deadline_s: how long each call may take.
    """

    def __init__(self, channel: grpc.aio.Channel, *, deadline_s: float = DEADLINE_S) -> None:
        self._stub = keymanager_pb2_grpc.KeyManagerServiceStub(channel)
        self._membership = keymanager_pb2_grpc.MembershipServiceStub(channel)
        self._deadline_s = deadline_s

    async def renew_certificate(self, csr_der: bytes) -> EnrolledCertificate:
        """A fresh certificate for the caller's own identity and the key in the PKCS#10 request. Any role."""
        request = keymanager_pb2.RenewCertificateRequest(csr_der=csr_der)
        response = await self._call(self._membership.RenewCertificate, request)
        return EnrolledCertificate(response.certificate_pem, response.authority_pem, "", response.not_after_ms)

    async def fetch_epoch(self, number: int = 0, hpke_public_key: bytes = b"") -> FetchedEpoch:
        """One epoch; with secrets only for role agent.

        Args:
            number: epoch number, 0 for the current one.
            hpke_public_key: `SealingKey.public_bytes` to get the sealed secrets, or empty.
        """
        request = keymanager_pb2.FetchEpochRequest(epoch=number, hpke_public_key=hpke_public_key)
        response = await self._call(self._stub.FetchEpoch, request)
        return _epoch(response.epoch, response.sealed_secrets)

    async def list_epochs(self) -> list[FetchedEpoch]:
        """All epochs, newest first, without public keys. Any role."""
        response = await self._call(self._stub.ListEpochs, keymanager_pb2.ListEpochsRequest())
        return [_epoch(epoch) for epoch in response.epochs]

    async def rotate_epoch(self, reason: str) -> FetchedEpoch:
        """Make a new epoch with new keys and a new seed. Role operator."""
        response = await self._call(self._stub.RotateEpoch, keymanager_pb2.RotateEpochRequest(reason=reason))
        return _epoch(response.epoch)

    async def retire_epoch(self, number: int) -> FetchedEpoch:
        """Destroy the secrets of a superseded epoch. Role operator."""
        response = await self._call(self._stub.RetireEpoch, keymanager_pb2.RetireEpochRequest(epoch=number))
        return _epoch(response.epoch)

    async def create_token(
        self, role: Role, name: str, ttl_s: int = 0, server_names: Sequence[str] = ()
    ) -> EnrolmentToken:
        """Make a one-time enrolment token. Role operator.

        Args:
            role: agent, aggregator or operator.
            name: name inside the role.
            ttl_s: validity, 60 to 2,592,000 seconds; 0 means a day.
            server_names: DNS names and IP addresses for an aggregator's certificate; at most 16.
        """
        request = keymanager_pb2.CreateEnrolmentTokenRequest(
            role=ROLES[role], name=name, ttl_s=ttl_s, server_names=server_names
        )
        response = await self._call(self._stub.CreateEnrolmentToken, request)
        return EnrolmentToken(
            response.token,
            response.authority_pem,
            response.expires_at_ms,
            response.keymanager_address,
            response.enrolment_address,
        )

    async def revoke(self, role: Role, name: str, reason: str) -> FetchedEpoch:
        """Revoke an identity for good and rotate; returns the epoch made because of it. Role operator."""
        request = keymanager_pb2.RevokeIdentityRequest(role=ROLES[role], name=name, reason=reason)
        response = await self._call(self._stub.RevokeIdentity, request)
        return _epoch(response.epoch)

    async def revocations(self) -> list[str]:
        """Revoked identities as URIs. Roles aggregator and operator."""
        response = await self._call(self._membership.ListRevocations, keymanager_pb2.ListRevocationsRequest())
        return list(response.identities)

    async def audit(self, after: int = 0, limit: int = 0) -> list[AuditRecord]:
        """Audit records with a greater sequence number than `after`, oldest first. Role operator.

        Args:
            after: sequence number to continue from.
            limit: 1 to 1,000; 0 means 100.
        """
        request = keymanager_pb2.ListAuditRecordsRequest(after=after, limit=limit)
        response = await self._call(self._stub.ListAuditRecords, request)
        return [
            AuditRecord(
                record.sequence,
                record.at_ms,
                record.actor,
                record.action,
                record.subject,
                record.outcome,
                record.digest,
            )
            for record in response.records
        ]

    async def _call(self, method: Any, request: Any) -> Any:
        return await call(method, request, timeout_s=self._deadline_s)


def _epoch(message: keymanager_pb2.Epoch, sealed_secrets: bytes = b"") -> FetchedEpoch:
    return FetchedEpoch(
        federation=message.federation,
        number=message.number,
        state=EPOCH_STATES.get(message.state, "unknown"),
        parameters=parameters_from_proto(message.parameters),
        public_key=message.he_public_key,
        sealed_secrets=sealed_secrets,
        created_at_ms=message.created_at_ms,
    )
