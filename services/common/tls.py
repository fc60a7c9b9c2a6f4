"""Mutual TLS from a folder of PEM files that may be renewed at any time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import grpc
import structlog
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from services.common.files import write_atomically
from services.common.identity import Identity, certificate_identity
from shelora.errors import InvalidConfiguration

_logger = structlog.get_logger(__name__)


@dataclass(frozen=True)
class IdentityFiles:
    """A member's key and certificates on disk.

    Attributes:
        folder: holds key.pem (mode 0600), certificate.pem and authority.pem.
    """

    folder: Path

    @property
    def key(self) -> Path:
        """The private key, PKCS#8 PEM without password."""
        return self.folder / "key.pem"

    @property
    def certificate(self) -> Path:
        """The member's certificate, PEM."""
        return self.folder / "certificate.pem"

    @property
    def authority(self) -> Path:
        """The federation's CA certificate, PEM."""
        return self.folder / "authority.pem"

    def complete(self) -> bool:
        """Whether all three files are there."""
        return self.key.is_file() and self.certificate.is_file() and self.authority.is_file()

    def write_key(self, pem: bytes) -> None:
        """Write the private key with mode 0600.

        Raises:
            StorageFull: the disk takes no more.
        """
        write_atomically(self.key, pem, mode=0o600)

    def write_certificate(self, certificate_pem: bytes, authority_pem: bytes) -> None:
        """Write a new certificate and its authority; the certificate last, so that complete() never sees half.

        Raises:
            StorageFull: the disk takes no more.
        """
        write_atomically(self.authority, authority_pem)
        write_atomically(self.certificate, certificate_pem)

    def read(self) -> tuple[bytes, bytes, bytes]:
        """Read and check key, certificate and authority.

        Returns:
            The three PEM texts in this order; the certificate belongs to the key.

        Raises:
            InvalidConfiguration: a file is missing or unreadable, or key and certificate do not belong together.
        """
        try:
            key, certificate, authority = (path.read_bytes() for path in (self.key, self.certificate, self.authority))
            public = load_pem_private_key(key, None).public_key()
            leaf = x509.load_pem_x509_certificate(certificate)
            x509.load_pem_x509_certificate(authority)
        except (OSError, ValueError, TypeError) as error:
            raise InvalidConfiguration(
                f"identity folder {self.folder}: expected readable key.pem, certificate.pem and authority.pem, "
                f"got {type(error).__name__}",
                hint="enrol this member again, or give the folder of an enrolled one",
            ) from error
        form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        if public.public_bytes(*form) != leaf.public_key().public_bytes(*form):
            raise InvalidConfiguration(
                f"identity folder {self.folder}: expected a certificate for key.pem, got one for another key",
                hint="enrol this member again",
            )
        return key, certificate, authority

    def identity(self) -> Identity:
        """The identity inside the certificate.

        Raises:
            InvalidConfiguration: files missing or unreadable.
            NotAuthenticated: the certificate carries no identity.
        """
        return certificate_identity(x509.load_pem_x509_certificate(self.read()[1]))

    def validity_ms(self) -> tuple[int, int]:
        """Begin and end of the certificate's validity in milliseconds since the Unix epoch.

        Raises:
            InvalidConfiguration: files missing or unreadable.
        """
        leaf = x509.load_pem_x509_certificate(self.read()[1])
        begin, end = leaf.not_valid_before_utc, leaf.not_valid_after_utc
        return int(begin.timestamp() * 1000), int(end.timestamp() * 1000)

    def stamp(self) -> tuple[tuple[int, int, int], ...]:
        """Changes whenever a file is replaced: inode, size and modification time of each.

        Raises:
            OSError: a file is missing.
        """
        states = [path.stat() for path in (self.key, self.certificate, self.authority)]
        return tuple((state.st_ino, state.st_size, state.st_mtime_ns) for state in states)


class _Renewal:
    """Answers gRPC's question, asked at every handshake, whether the certificate has changed."""

    def __init__(self, files: IdentityFiles) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._stamp = files.stamp()

    def load(self) -> grpc.ServerCertificateConfiguration:
        key, certificate, authority = self._files.read()
        return grpc.ssl_server_certificate_configuration([(key, certificate)], authority)

    def fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """The new configuration, or None to go on with the one in use. Runs on gRPC's threads and must not raise."""
        with self._lock:
            try:
                stamp = self._files.stamp()
                if stamp == self._stamp:
                    return None
                configuration = self.load()
            except (OSError, InvalidConfiguration) as error:
                # In the middle of a renewal, or broken by hand: the certificate in use goes on serving.
                _logger.warning("renewed certificate not usable, the old one stays", reason=str(error))
                return None
            self._stamp = stamp
            _logger.info("certificate renewed")
            return configuration


def server_credentials(files: IdentityFiles, require_client: bool) -> grpc.ServerCredentials:
    """TLS for a server; renewed files are used from the next connection on, without a restart.

    Args:
        files: the server's identity.
        require_client: True demands a client certificate of the same authority (mutual TLS); False asks for none.

    Raises:
        InvalidConfiguration: files missing, unreadable or not belonging together.
    """
    try:
        renewal = _Renewal(files)
    except OSError as error:
        raise InvalidConfiguration(
            f"identity folder {files.folder}: expected key.pem, certificate.pem and authority.pem, "
            f"got {type(error).__name__}",
            hint="enrol this member first",
        ) from error
    # The stubs do not know that the fetcher may answer None.
    fetch = cast("Callable[[], grpc.ServerCertificateConfiguration]", renewal.fetch)
    return grpc.dynamic_ssl_server_credentials(renewal.load(), fetch, require_client)


def channel_credentials(files: IdentityFiles) -> grpc.ChannelCredentials:
    """Mutual TLS for a client. The files are read once: open a new channel after a renewal.

    Raises:
        InvalidConfiguration: files missing, unreadable or not belonging together.
    """
    key, certificate, authority = files.read()
    return grpc.ssl_channel_credentials(authority, key, certificate)


def channel_credentials_for_enrolment(authority_pem: bytes) -> grpc.ChannelCredentials:
    """TLS for a client that has no certificate yet: it checks the server against the federation's authority.

    Raises:
        InvalidConfiguration: not a certificate in PEM. (An empty text would mean the machine's public authorities.)
    """
    try:
        x509.load_pem_x509_certificate(authority_pem)
    except ValueError as error:
        raise InvalidConfiguration(
            "authority_pem: expected the federation's CA certificate in PEM, got unreadable bytes",
            hint="ask the operator for a new enrolment file",
        ) from error
    return grpc.ssl_channel_credentials(authority_pem)
