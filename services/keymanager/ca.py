"""The federation's certificate authority: one P-256 root, short-lived leaf certificates for its members."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Final, NoReturn, SupportsIndex

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from services.common.identity import Identity, Role
from shelora.errors import InvalidConfiguration, MalformedPayload, PayloadTooLarge, StoredBytesCorrupt

ROOT_LIFETIME: Final = timedelta(days=3653)
BACKDATE: Final = timedelta(minutes=5)
"""How far before its making a certificate becomes valid: members' clocks may run behind."""

MAX_REQUEST_BYTES: Final = 16_384
MAX_SERVER_NAMES: Final = 16
SERVING_ROLES: Final = frozenset({Role.AGGREGATOR, Role.KEYMANAGER})
_DNS_NAME: Final = re.compile(
    r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*"
)


@dataclass(frozen=True)
class Issued:
    """A fresh certificate.

    Attributes:
        certificate_pem: the certificate.
        authority_pem: the root it is signed by.
        identity: who it is for.
        serial: its serial number in hexadecimal, for the audit log.
        not_after_ms: end of validity.
    """

    certificate_pem: str
    authority_pem: str
    identity: Identity
    serial: str
    not_after_ms: int


class Authority:
    """The root certificate and its key. The key leaves only through `private_der`, to be sealed."""

    __slots__ = ("_key", "certificate", "federation")

    def __init__(self, federation: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self.federation = federation
        self.certificate = certificate
        self._key = key

    @classmethod
    def create(cls, federation: str, now_ms: int) -> Authority:
        key = ec.generate_private_key(ec.SECP256R1())
        now = _time(now_ms)
        name = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, federation),
                x509.NameAttribute(NameOID.COMMON_NAME, "shelora federation authority"),
            ]
        )
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BACKDATE)
            .not_valid_after(now + ROOT_LIFETIME)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )
        return cls(federation, builder.sign(key, hashes.SHA256()), key)

    @classmethod
    def load(cls, federation: str, certificate_pem: str, private_der: bytes) -> Authority:
        """Inverse of `pem` and `private_der`.

        Raises: StoredBytesCorrupt when they do not belong together or name another federation.
        """
        try:
            certificate = x509.load_pem_x509_certificate(certificate_pem.encode())
            key = load_der_private_key(private_der, None)
        except (ValueError, TypeError) as error:
            raise _corrupt_authority("readable key and certificate") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise _corrupt_authority("a key that belongs to the root certificate")
        owners = certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
        if [owner.value for owner in owners] != [federation]:
            raise InvalidConfiguration(
                f"federation: expected {[owner.value for owner in owners]}, whose state this is, got {federation!r}",
                hint="give every federation its own state_dir, or correct the federation in the configuration",
            )
        return cls(federation, certificate, key)

    @property
    def pem(self) -> str:
        return self.certificate.public_bytes(Encoding.PEM).decode()

    def private_der(self) -> bytes:
        """The private key, to be sealed and stored; for nothing else."""
        return self._key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())

    def issue(
        self,
        identity: Identity,
        public_key: ec.EllipticCurvePublicKey,
        *,
        now_ms: int,
        lifetime_s: int,
        server_names: Sequence[str] = (),
    ) -> Issued:
        """Sign a certificate for a member; never valid longer than the root."""
        now = _time(now_ms)
        not_after = min(now + timedelta(seconds=lifetime_s), self.certificate.not_valid_after_utc)
        if not_after <= now:
            raise InvalidConfiguration(
                f"root certificate: expected one that is valid now, got one that ended {not_after.isoformat()}",
                hint="set up a new state_dir with `shelora-keymanager init` and enrol all members again",
            )
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
        if identity.role in SERVING_ROLES:
            usages.insert(0, ExtendedKeyUsageOID.SERVER_AUTH)
        root_key = self._key.public_key()
        certificate = (
            x509.CertificateBuilder()
            .subject_name(
                x509.Name(
                    [
                        x509.NameAttribute(NameOID.ORGANIZATION_NAME, self.federation),
                        x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, identity.role.value),
                        x509.NameAttribute(NameOID.COMMON_NAME, identity.name),
                    ]
                )
            )
            .issuer_name(self.certificate.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(max(now - BACKDATE, self.certificate.not_valid_before_utc))
            .not_valid_after(not_after)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(x509.SubjectAlternativeName(_alternative_names(identity, server_names)), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return Issued(
            certificate_pem=certificate.public_bytes(Encoding.PEM).decode(),
            authority_pem=self.pem,
            identity=identity,
            serial=f"{certificate.serial_number:x}",
            not_after_ms=int(certificate.not_valid_after_utc.timestamp()) * 1000,
        )

    def __repr__(self) -> str:
        return f"Authority(<redacted>, federation={self.federation!r})"

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError("an Authority cannot be pickled or copied")


def parse_signing_request(csr_der: bytes) -> ec.EllipticCurvePublicKey:
    """The public key of a PKCS#10 request that is signed with its private key. Names in the request are ignored."""
    if len(csr_der) > MAX_REQUEST_BYTES:
        raise PayloadTooLarge(
            f"signing request: expected at most {MAX_REQUEST_BYTES} bytes, got {len(csr_der)}",
            hint="send a PKCS#10 request in DER without extensions",
        )
    try:
        request = x509.load_der_x509_csr(csr_der)
        key = request.public_key()
        valid = request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature) as error:
        raise MalformedPayload(
            f"signing request: expected PKCS#10 in DER, got {len(csr_der)} other bytes",
            hint="make a P-256 key and sign the request with it",
        ) from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1) or not valid:
        raise MalformedPayload(
            "signing request: expected a P-256 key that signed the request, got another key or signature",
            hint="make a P-256 key and sign the request with it",
        )
    return key


def key_bytes(public_key: ec.EllipticCurvePublicKey) -> bytes:
    """The bytes that stand for a public key: SubjectPublicKeyInfo in DER."""
    return public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def check_server_names(names: Sequence[str], role: Role) -> tuple[str, ...]:
    """Check the DNS names and IP addresses for a certificate; serving roles need at least one, others have none."""
    if role not in SERVING_ROLES:
        if names:
            raise InvalidConfiguration(
                f"server names: expected none for role {role.value}, got {len(names)}",
                hint="only an aggregator is connected to; leave them out",
            )
        return ()
    if not 1 <= len(names) <= MAX_SERVER_NAMES:
        raise InvalidConfiguration(
            f"server names: expected 1 to {MAX_SERVER_NAMES} for role {role.value}, got {len(names)}",
            hint="name every DNS name and IP address that members use to reach it: --server-name localhost",
        )
    for name in names:
        _general_name(name)
    return tuple(dict.fromkeys(name.lower() for name in names))


def _alternative_names(identity: Identity, server_names: Sequence[str]) -> list[x509.GeneralName]:
    return [x509.UniformResourceIdentifier(identity.uri), *(_general_name(name) for name in server_names)]


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        lowered = name.lower()
    # A last label of digits alone would be a mistyped IP address.
    if _DNS_NAME.fullmatch(lowered) is None or lowered.rpartition(".")[2].isdigit():
        raise InvalidConfiguration(
            f"server name: expected a DNS name or an IP address, got {name[:80]!r}",
            hint="write for example aggregator.example.org or 192.0.2.7, without a port",
        )
    return x509.DNSName(lowered)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _time(now_ms: int) -> datetime:
    return datetime.fromtimestamp(now_ms // 1000, tz=timezone.utc)


def _corrupt_authority(expected: str) -> StoredBytesCorrupt:
    return StoredBytesCorrupt(
        f"certificate authority: expected {expected}, got other stored bytes",
        hint="restore the key manager's database from a backup",
    )
