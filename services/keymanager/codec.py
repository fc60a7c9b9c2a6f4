"""Messages of the key manager's contract, to domain values and back."""

from __future__ import annotations

from typing import Final

from services.common.audit import AuditRecord
from services.common.codec import parameters_to_proto
from services.common.identity import Role
from services.common.keymanager_client import ROLES, EnrolmentToken
from services.common.versions import own_version
from services.keymanager.ca import Issued
from services.keymanager.domain import Epoch, EpochState
from shelora.errors import InvalidIdentifier
from shelora.v1 import keymanager_pb2

_STATES: Final = {
    EpochState.CURRENT: keymanager_pb2.EPOCH_STATE_CURRENT,
    EpochState.SUPERSEDED: keymanager_pb2.EPOCH_STATE_SUPERSEDED,
    EpochState.RETIRED: keymanager_pb2.EPOCH_STATE_RETIRED,
}
_ROLES: Final = {int(wire): role for role, wire in ROLES.items()}


def role_from_proto(value: int) -> Role:
    role = _ROLES.get(value)
    if role is None:
        raise InvalidIdentifier(
            f"role: expected one of {sorted(_ROLES)}, got {value}",
            hint="name the role of the identity; install the same release on both sides",
        )
    return role


def epoch_to_proto(federation: str, epoch: Epoch, *, with_public_key: bool = True) -> keymanager_pb2.Epoch:
    return keymanager_pb2.Epoch(
        federation=federation,
        number=epoch.number,
        state=_STATES[epoch.state],
        parameters=parameters_to_proto(epoch.parameters),
        he_public_key=epoch.public_key if with_public_key else b"",
        created_at_ms=epoch.created_at_ms,
    )


def enrol_response(issued: Issued) -> keymanager_pb2.EnrolResponse:
    return keymanager_pb2.EnrolResponse(
        certificate_pem=issued.certificate_pem,
        authority_pem=issued.authority_pem,
        identity=issued.identity.uri,
        not_after_ms=issued.not_after_ms,
        version=own_version(),
    )


def renew_response(issued: Issued) -> keymanager_pb2.RenewCertificateResponse:
    return keymanager_pb2.RenewCertificateResponse(
        certificate_pem=issued.certificate_pem,
        authority_pem=issued.authority_pem,
        not_after_ms=issued.not_after_ms,
    )


def token_response(token: EnrolmentToken) -> keymanager_pb2.CreateEnrolmentTokenResponse:
    return keymanager_pb2.CreateEnrolmentTokenResponse(
        token=token.token,
        authority_pem=token.authority_pem,
        expires_at_ms=token.expires_at_ms,
        keymanager_address=token.keymanager,
        enrolment_address=token.enrolment,
    )


def record_to_proto(record: AuditRecord) -> keymanager_pb2.AuditRecord:
    return keymanager_pb2.AuditRecord(
        sequence=record.sequence,
        at_ms=record.at_ms,
        actor=record.actor,
        action=record.action,
        subject=record.subject,
        outcome=record.outcome,
        digest=record.digest,
    )
