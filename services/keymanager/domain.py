"""What the key manager keeps, as values."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from services.common.identity import Identity, Role
from shelora.he.parameters import CkksParameters


class EpochState(str, enum.Enum):
    """Life of an epoch: current, then superseded by a newer one, then retired for good."""

    CURRENT = "current"
    SUPERSEDED = "superseded"
    RETIRED = "retired"

    def __str__(self) -> str:
        return self.value


class Action(str, enum.Enum):
    """Actions in the audit log."""

    ENROL = "enrol"
    RENEW = "renew"
    FETCH_PUBLIC = "fetch-public"
    FETCH_SECRET = "fetch-secret"  # noqa: S105 - the name of an action
    ROTATE = "rotate"
    RETIRE = "retire"
    TOKEN = "token"  # noqa: S105 - the name of an action
    REVOKE = "revoke"
    RESEAL = "reseal"
    DENIED = "denied"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Epoch:
    """The public side of a key epoch.

    Attributes:
        number: from 1.
        state: current, superseded or retired.
        parameters: the CKKS parameter set.
        public_key: residues of the public key.
        created_at_ms: when it was made.
    """

    number: int
    state: EpochState
    parameters: CkksParameters
    public_key: bytes = field(repr=False)
    created_at_ms: int


@dataclass(frozen=True)
class SealedSecrets:
    """The secret side of an epoch as the database holds it: sealed under the key-encryption key.

    Attributes:
        secret_key: the sealed CKKS secret key.
        seed: the sealed federation seed.
    """

    secret_key: bytes = field(repr=False)
    seed: bytes = field(repr=False)


@dataclass(frozen=True)
class StoredAuthority:
    """The certificate authority as the database holds it.

    Attributes:
        federation: whose it is.
        certificate_pem: the root certificate.
        sealed_key: its private key, sealed.
    """

    federation: str
    certificate_pem: str
    sealed_key: bytes = field(repr=False)


@dataclass(frozen=True)
class TokenGrant:
    """What a one-time token entitles to.

    Attributes:
        role: role of the identity.
        name: name inside the role.
        server_names: DNS names and IP addresses for the certificate.
        expires_at_ms: end of validity.
        key_digest: SHA-256 of the public key that used it first, None while unused.
    """

    role: Role
    name: str
    server_names: tuple[str, ...]
    expires_at_ms: int
    key_digest: bytes | None


@dataclass(frozen=True)
class Member:
    """An enrolled identity.

    Attributes:
        identity: who.
        server_names: DNS names and IP addresses in its certificates.
        not_after_ms: end of its newest certificate.
    """

    identity: Identity
    server_names: tuple[str, ...]
    not_after_ms: int


@dataclass(frozen=True)
class Revocation:
    """A revoked identity.

    Attributes:
        identity: who.
        epoch: number of the epoch made because of it.
        at_ms: when.
    """

    identity: Identity
    epoch: int
    at_ms: int


def authority_purpose(federation: str) -> str:
    return f"authority key of {federation}"


def secret_key_purpose(federation: str, epoch: int) -> str:
    return f"secret key of epoch {epoch} of {federation}"


def seed_purpose(federation: str, epoch: int) -> str:
    return f"seed of epoch {epoch} of {federation}"


def audit_purpose(federation: str) -> str:
    return f"audit head of {federation}"
