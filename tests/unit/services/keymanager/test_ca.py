from __future__ import annotations

import ipaddress
import pickle
from datetime import datetime, timedelta, timezone

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import PolicyBuilder, Store

from services.common.identity import Identity, Role, certificate_identity
from services.keymanager.ca import Authority, check_server_names, parse_signing_request
from shelora.errors import InvalidConfiguration, MalformedPayload, PayloadTooLarge, StoredBytesCorrupt
from support.keymanager import signing_request

NOW_MS = 1_700_000_000_000
NOW = datetime.fromtimestamp(NOW_MS / 1000, tz=timezone.utc)
KEY = ec.generate_private_key(ec.SECP256R1())
AUTHORITY = Authority.create("clinics", NOW_MS)


def issued(role: Role, names: tuple[str, ...] = (), lifetime_s: int = 3600) -> x509.Certificate:
    answer = AUTHORITY.issue(
        Identity("clinics", role, "one"),
        KEY.public_key(),
        now_ms=NOW_MS,
        lifetime_s=lifetime_s,
        server_names=names,
    )
    assert answer.authority_pem == AUTHORITY.pem
    certificate = x509.load_pem_x509_certificate(answer.certificate_pem.encode())
    assert answer.not_after_ms == int(certificate.not_valid_after_utc.timestamp() * 1000)
    assert answer.serial == f"{certificate.serial_number:x}"
    return certificate


def test_the_root_signs_leaves_only_and_lasts_ten_years() -> None:
    root = AUTHORITY.certificate
    constraints = root.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert (constraints.value.ca, constraints.value.path_length) == (True, 0)
    usage = root.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.key_cert_sign
    assert not usage.digital_signature
    assert root.not_valid_after_utc - NOW == timedelta(days=3653)
    assert isinstance(root.public_key(), ec.EllipticCurvePublicKey)


@pytest.mark.parametrize("role", list(Role))
def test_a_leaf_carries_exactly_its_identity_and_its_uses(role: Role) -> None:
    names = ("aggregator.example.org", "192.0.2.7") if role in {Role.AGGREGATOR, Role.KEYMANAGER} else ()
    leaf = issued(role, names)
    leaf.verify_directly_issued_by(AUTHORITY.certificate)
    assert certificate_identity(leaf) == Identity("clinics", role, "one")
    alternatives = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert len(alternatives) == 1 + len(names)
    if names:
        assert alternatives.get_values_for_type(x509.DNSName) == ["aggregator.example.org"]
        assert alternatives.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address("192.0.2.7")]
    usages = set(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    serving = {ExtendedKeyUsageOID.SERVER_AUTH} if names else set()
    assert usages == {ExtendedKeyUsageOID.CLIENT_AUTH} | serving
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_a_leaf_is_valid_five_minutes_before_it_was_made() -> None:
    leaf = issued(Role.AGENT, lifetime_s=7200)
    assert leaf.not_valid_before_utc == NOW - timedelta(minutes=5)
    assert leaf.not_valid_after_utc == NOW + timedelta(hours=2)


def test_a_chain_passes_a_strict_verifier() -> None:
    policy = PolicyBuilder().store(Store([AUTHORITY.certificate])).time(NOW)
    verified = policy.build_client_verifier().verify(issued(Role.AGENT), [])
    assert verified.subjects is not None
    server = policy.build_server_verifier(x509.DNSName("localhost"))
    assert len(server.verify(issued(Role.AGGREGATOR, ("localhost",)), [])) == 2


def test_no_leaf_outlives_the_root() -> None:
    late_ms = NOW_MS + 3652 * 86_400_000
    answer = AUTHORITY.issue(
        Identity("clinics", Role.AGENT, "one"), KEY.public_key(), now_ms=late_ms, lifetime_s=30 * 86_400
    )
    assert answer.not_after_ms == int(AUTHORITY.certificate.not_valid_after_utc.timestamp() * 1000)
    with pytest.raises(InvalidConfiguration, match="root certificate"):
        AUTHORITY.issue(
            Identity("clinics", Role.AGENT, "one"), KEY.public_key(), now_ms=late_ms + 2 * 86_400_000, lifetime_s=60
        )


def test_an_authority_survives_storage_and_tells_strangers_apart() -> None:
    again = Authority.load("clinics", AUTHORITY.pem, AUTHORITY.private_der())
    assert again.certificate == AUTHORITY.certificate
    other = Authority.create("clinics", NOW_MS)
    with pytest.raises(StoredBytesCorrupt, match="belongs to the root"):
        Authority.load("clinics", AUTHORITY.pem, other.private_der())
    with pytest.raises(StoredBytesCorrupt, match="readable"):
        Authority.load("clinics", AUTHORITY.pem, b"no key")
    with pytest.raises(InvalidConfiguration, match="federation"):
        Authority.load("banks", AUTHORITY.pem, AUTHORITY.private_der())


def test_an_authority_cannot_leak_by_accident() -> None:
    assert repr(AUTHORITY) == "Authority(<redacted>, federation='clinics')"
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(AUTHORITY)


def test_a_signing_request_gives_its_public_key() -> None:
    assert parse_signing_request(signing_request(KEY)) == KEY.public_key()


def test_signing_requests_with_foreign_keys_are_refused() -> None:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    for key in (ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048)):
        with pytest.raises(MalformedPayload, match="P-256"):
            parse_signing_request(builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER))


def test_signing_requests_without_proof_of_possession_are_refused() -> None:
    request = bytearray(signing_request(KEY))
    request[-1] ^= 1
    with pytest.raises(MalformedPayload):
        parse_signing_request(bytes(request))


@pytest.mark.parametrize("request_der", [b"", b"\x30\x03abc", b"-----BEGIN"])
def test_unreadable_signing_requests_are_refused(request_der: bytes) -> None:
    with pytest.raises(MalformedPayload, match=f"got {len(request_der)} other bytes"):
        parse_signing_request(request_der)


def test_an_oversized_signing_request_is_not_parsed() -> None:
    with pytest.raises(PayloadTooLarge, match="16384"):
        parse_signing_request(bytes(16_385))


def test_server_names_are_for_serving_roles() -> None:
    assert check_server_names(("Localhost", "localhost", "::1"), Role.AGGREGATOR) == ("localhost", "::1")
    assert check_server_names((), Role.AGENT) == ()
    with pytest.raises(InvalidConfiguration, match="expected none for role agent, got 1"):
        check_server_names(("localhost",), Role.AGENT)
    with pytest.raises(InvalidConfiguration, match="expected 1 to 16"):
        check_server_names((), Role.AGGREGATOR)
    with pytest.raises(InvalidConfiguration, match="expected 1 to 16"):
        check_server_names(tuple(f"host-{number}" for number in range(17)), Role.AGGREGATOR)


@pytest.mark.parametrize("name", ["", "a b", "host:443", "*.example.org", "-x.org", "x" * 64, "1.2.3", "ä.org"])
def test_impossible_server_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidConfiguration, match="server name"):
        check_server_names((name,), Role.AGGREGATOR)
