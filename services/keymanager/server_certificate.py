"""The key manager's own TLS certificate: made by itself, kept in memory, renewed before it ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Final, cast

import grpc
import structlog
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from services.common.clock import Clock
from services.common.enrolment import RENEW_AT
from services.common.identity import Identity, Role
from services.keymanager.ca import Authority
from shelora.errors import SheLoraError

NAME: Final = "keymanager"

_logger = structlog.get_logger(__name__)


class ServerCertificate:
    """Certificates for all ports. The private key exists in this process only, so every start makes a new one.

    Args:
        authority: signs it.
        server_names: DNS names and IP addresses that members connect to.
        lifetime_s: validity; a new one is made after two thirds of it.
        clock: when that is.
    """

    def __init__(self, authority: Authority, server_names: Sequence[str], lifetime_s: int, clock: Clock) -> None:
        self._authority = authority
        self._identity = Identity(authority.federation, Role.KEYMANAGER, NAME)
        self._server_names = tuple(server_names)
        self._lifetime_s = lifetime_s
        self._clock = clock
        self._lock = threading.Lock()
        self._generation = 0
        self._renew_at_ms = 0
        self._configuration = self._renew()

    def credentials(self, *, require_client: bool) -> grpc.ServerCredentials:
        """TLS for one port; asked at every handshake whether the certificate has changed."""
        used = self._generation

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            nonlocal used
            generation, configuration = self._current()
            if generation == used:
                return None
            used = generation
            return configuration

        # The stubs do not know that the fetcher may answer None.
        fetcher = cast("Callable[[], grpc.ServerCertificateConfiguration]", fetch)
        return grpc.dynamic_ssl_server_credentials(self._configuration, fetcher, require_client)

    def _current(self) -> tuple[int, grpc.ServerCertificateConfiguration]:
        """Runs on gRPC's threads and must not raise."""
        with self._lock:
            if self._clock.now_ms() >= self._renew_at_ms:
                try:
                    self._configuration = self._renew()
                except SheLoraError as error:
                    _logger.error("own certificate not renewed", code=error.code, reason=str(error))
            return self._generation, self._configuration

    def _renew(self) -> grpc.ServerCertificateConfiguration:
        key = ec.generate_private_key(ec.SECP256R1())
        now_ms = self._clock.now_ms()
        issued = self._authority.issue(
            self._identity,
            key.public_key(),
            now_ms=now_ms,
            lifetime_s=self._lifetime_s,
            server_names=self._server_names,
        )
        self._generation += 1
        self._renew_at_ms = now_ms + int((issued.not_after_ms - now_ms) * RENEW_AT)
        private_pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        chain = [(private_pem, issued.certificate_pem.encode())]
        return grpc.ssl_server_certificate_configuration(chain, issued.authority_pem.encode())
