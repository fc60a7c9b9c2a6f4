"""A certificate authority of one test, made fresh."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from services.common.tls import IdentityFiles

Issue = Callable[..., IdentityFiles]
_DAY = datetime.timedelta(days=1)


class Authority:
    """Signs certificates for the tests of TLS and identities."""

    def __init__(self, name: str = "test authority") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        self.certificate = (
            self._builder(self._name, self._key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.pem = self.certificate.public_bytes(Encoding.PEM)

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.timezone.utc)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _DAY)
            .not_valid_after(now + _DAY)
        )

    def sign(self, key: ec.EllipticCurvePrivateKey, uris: list[str]) -> x509.Certificate:
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in uris]
        names += [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "member")])
        return (
            self._builder(subject, key)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(self._key, hashes.SHA256())
        )

    def issue(self, folder: Path, *uris: str) -> IdentityFiles:
        """Write a new key and certificate into the folder, or a new certificate for the key that is there."""
        files = IdentityFiles(folder)
        key = ec.generate_private_key(ec.SECP256R1())
        files.write_key(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        files.write_certificate(self.sign(key, list(uris)).public_bytes(Encoding.PEM), self.pem)
        return files


@pytest.fixture
def authority() -> Authority:
    return Authority()
