"""Who is calling: identities as URIs in certificates."""

from __future__ import annotations

import enum
import functools
import re
from dataclasses import dataclass
from typing import Any

import grpc
from cryptography import x509

from shelora.errors import InvalidIdentifier, NotAuthenticated, RoleDenied

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_SHOWN_CHARACTERS = 80


class Role(str, enum.Enum):
    """What a certificate allows; the value is the path segment of the identity's URI."""

    AGENT = "agent"
    AGGREGATOR = "aggregator"
    OPERATOR = "operator"
    KEYMANAGER = "keymanager"

    def __str__(self) -> str:
        return self.value


def check_name(text: str, what: str) -> str:
    """Check a federation, agent, operator or service name.

    Args:
        text: the name; 1 to 63 characters a-z, 0-9 and inner hyphens.
        what: what the name stands for, used in the message ("agent", "federation").

    Returns:
        The same text.

    Raises:
        InvalidIdentifier: the text breaks the rule.
    """
    if _NAME.fullmatch(text) is None:
        raise InvalidIdentifier(
            f"{what} name: expected 1 to 63 characters of a-z, 0-9 and inner hyphens, got {text[:_SHOWN_CHARACTERS]!r}",
            hint="choose a lower-case name such as agent-1",
        )
    return text


@dataclass(frozen=True, order=True)
class Identity:
    """One member of a federation.

    Attributes:
        federation: name of the federation.
        role: what the member may do.
        name: name inside the role.

    Raises:
        InvalidIdentifier: federation or name breaks the rule for names.
    """

    federation: str
    role: Role
    name: str

    def __post_init__(self) -> None:
        check_name(self.federation, "federation")
        check_name(self.name, self.role.value)

    @property
    def uri(self) -> str:
        """The identity as spiffe://<federation>/<role>/<name>."""
        return f"spiffe://{self.federation}/{self.role.value}/{self.name}"

    @classmethod
    def parse(cls, uri: str) -> Identity:
        """Read spiffe://<federation>/<role>/<name>.

        Raises:
            InvalidIdentifier: the URI has another form, an unknown role or a bad name.
        """
        head, separator, rest = uri.partition("://")
        parts = rest.split("/")
        if head != "spiffe" or not separator or len(parts) != 3:
            raise InvalidIdentifier(
                f"identity: expected spiffe://<federation>/<role>/<name>, got {uri[:_SHOWN_CHARACTERS]!r}",
                hint="enrol again to get a certificate with a proper identity",
            )
        federation, role, name = parts
        if role not in {known.value for known in Role}:
            raise InvalidIdentifier(
                f"identity: expected a role out of {', '.join(known.value for known in Role)}, "
                f"got {role[:_SHOWN_CHARACTERS]!r}"
            )
        return cls(federation, Role(role), name)


def certificate_identity(certificate: x509.Certificate) -> Identity:
    """The identity inside a certificate; the certificate's validity is not checked here.

    Raises:
        NotAuthenticated: there is no URI in the subject alternative names, there are several, or it does not parse.
    """
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (x509.ExtensionNotFound, ValueError) as error:
        raise NotAuthenticated("certificate: expected one identity URI, got no readable alternative names") from error
    if len(uris) != 1:
        raise NotAuthenticated(f"certificate: expected one identity URI, got {len(uris)}")
    try:
        return Identity.parse(uris[0])
    except InvalidIdentifier as error:
        raise NotAuthenticated(f"certificate: {error.message}") from error


@functools.lru_cache(maxsize=4096)
def _pem_identity(pem: bytes) -> Identity:
    try:
        certificate = x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise NotAuthenticated(
            "client certificate: expected an X.509 certificate in PEM, got unreadable bytes"
        ) from error
    return certificate_identity(certificate)


def peer_identity(context: grpc.aio.ServicerContext[Any, Any]) -> Identity:
    """The caller's identity, from the client certificate that TLS has verified.

    Raises:
        NotAuthenticated: no client certificate, or one without exactly one identity URI.
    """
    certificates = list(context.auth_context().get("x509_pem_cert", ()))
    if not certificates:
        raise NotAuthenticated(
            "client certificate: expected one signed by the federation's authority, got none",
            hint="enrol first, then connect with the certificate",
        )
    return _pem_identity(bytes(certificates[0]))


def require_role(context: grpc.aio.ServicerContext[Any, Any], *roles: Role, federation: str | None = None) -> Identity:
    """The caller's identity if it has one of the roles and belongs to the federation.

    Args:
        context: the call.
        roles: roles that may call; at least one.
        federation: the federation the caller must belong to; None admits any.

    Raises:
        NotAuthenticated: no usable client certificate.
        RoleDenied: another role or another federation.
    """
    identity = peer_identity(context)
    if identity.role not in roles:
        raise RoleDenied(
            f"role: expected {' or '.join(role.value for role in roles)}, got {identity.role.value}",
            hint="use an identity that was enrolled for this role",
            context={"identity": identity.uri},
        )
    if federation is not None and identity.federation != federation:
        raise RoleDenied(
            f"federation: expected {federation[:_SHOWN_CHARACTERS]}, got {identity.federation}",
            hint="use an identity that was enrolled in this federation",
            context={"identity": identity.uri},
        )
    return identity
