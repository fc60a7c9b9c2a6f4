"""A certificate authority that lives as long as a test and signs what no key manager would."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from services.common.identity import Identity, Role
from services.common.tls import IdentityFiles

_LIFETIME = datetime.timedelta(hours=1)


class ThrowawayAuthority:
    """Signs certificates for any identity of one federation.

    Args:
        folder: where identity folders go.
        federation: named in the identities.
    """

    def __init__(self, folder: Path, federation: str = "ward") -> None:
        self.folder = folder
        self.federation = federation
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test authority")])
        extension = x509.BasicConstraints(ca=True, path_length=0)
        self.certificate = self._builder(self._name, self._key).add_extension(extension, True).sign(self._key, _HASH)

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    def issue(
        self, role: Role, name: str, *, federation: str | None = None, uris: tuple[str, ...] | None = None
    ) -> IdentityFiles:
        """A complete identity folder for a member; `uris` replaces the identity in the certificate."""
        identity = Identity(federation or self.federation, role, name)
        files = IdentityFiles(self.folder / f"{identity.federation}-{role.value}-{name}")
        key = ec.generate_private_key(ec.SECP256R1())
        found = (identity.uri,) if uris is None else uris
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in found]
        if role in {Role.AGGREGATOR, Role.KEYMANAGER}:
            names += [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        builder = self._builder(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]), key)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), False)
        files.write_key(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        files.write_certificate(builder.sign(self._key, _HASH).public_bytes(Encoding.PEM), self.pem)
        return files

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.timezone.utc)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _LIFETIME)
            .not_valid_after(now + _LIFETIME)
        )


_HASH = hashes.SHA256()
