"""A member's private key, its signing request, and the check of the certificate that comes back."""

from __future__ import annotations

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from services.common.identity import Identity, certificate_identity
from services.common.keymanager_client import EnrolledCertificate
from services.common.tls import IdentityFiles
from shelora.errors import IdentityConflict, InvalidConfiguration, MalformedPayload


def load_or_make_key(files: IdentityFiles) -> ec.EllipticCurvePrivateKey:
    """The private key of an identity folder, a new P-256 key if there is none; it is on disk before it is returned.

    Raises:
        InvalidConfiguration: key.pem is not an elliptic curve key.
        StorageFull: the disk takes no more.
    """
    if not files.key.exists():
        key = ec.generate_private_key(ec.SECP256R1())
        files.write_key(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return load_key(files)


def load_key(files: IdentityFiles) -> ec.EllipticCurvePrivateKey:
    """The private key of an identity folder.

    Raises:
        InvalidConfiguration: key.pem is missing or not an elliptic curve key.
    """
    try:
        key = load_pem_private_key(files.key.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise InvalidConfiguration(
            f"{files.key}: expected a private key in PEM, got {type(error).__name__}",
            hint="delete the file to make a new key, then enrol with a new token",
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InvalidConfiguration(f"{files.key}: expected an elliptic curve key, got {type(key).__name__}")
    return key


def signing_request(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A PKCS#10 request in DER for the key; it names nobody: names come from the token or the certificate in use."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


def check_answer(answer: EnrolledCertificate, key: ec.EllipticCurvePrivateKey, who: Identity, authority: str) -> None:
    """Accept a certificate only if it is ours: same authority, signed by it, our key, our identity.

    Args:
        answer: what the key manager sent.
        key: our private key.
        who: our identity.
        authority: the federation's root certificate in PEM, as known before the call.

    Raises:
        IdentityConflict: any of the four differs.
    """
    try:
        leaf = x509.load_pem_x509_certificate(answer.certificate_pem.encode())
        root = x509.load_pem_x509_certificate(authority.encode())
        leaf.verify_directly_issued_by(root)
        same_authority = same_certificate(answer.authority_pem, authority)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise IdentityConflict(
            "certificate: expected one signed by the federation's authority, got another one",
            hint="check that the address belongs to this federation's key manager",
        ) from error
    found = certificate_identity(leaf)
    own_key = _public_der(leaf.public_key()) == _public_der(key.public_key())
    if found != who or not own_key or not same_authority:
        raise IdentityConflict(
            f"certificate: expected {who.uri} with our key, got {found.uri} with {'our' if own_key else 'another'} key",
            hint="check that the enrolment file was made for this member and this federation",
        )


def same_certificate(first: str, second: str) -> bool:
    """Whether two PEM texts hold the same certificate.

    Raises:
        InvalidConfiguration: one of them holds none.
    """
    try:
        return x509.load_pem_x509_certificate(first.encode()) == x509.load_pem_x509_certificate(second.encode())
    except ValueError as error:
        raise InvalidConfiguration(
            "authority: expected a certificate in PEM, got unreadable text", hint="ask for a new enrolment file"
        ) from error


def _public_der(key: object) -> bytes:
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise MalformedPayload(f"certificate: expected an elliptic curve key, got {type(key).__name__}")
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
