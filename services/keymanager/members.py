"""Members: tokens, enrolment, renewal."""

from __future__ import annotations

import base64
import hashlib
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec

from services.common.clock import Clock
from services.common.identity import Identity, Role
from services.common.keymanager_client import EnrolmentToken
from services.keymanager.audit import ANONYMOUS, AuditLog
from services.keymanager.ca import Authority, Issued, check_server_names, key_bytes, parse_signing_request
from services.keymanager.domain import Action, Member, TokenGrant
from services.keymanager.gate import ANY_ROLE, Actor, Gate, actor_name, refuse_revoked
from services.keymanager.store import Records, Store
from shelora.errors import InvalidIdentifier, InvalidToken, UnknownAgent, UnknownFederation, ValueOutOfRange

Addresses = Callable[[Role], tuple[str, str]]
"""For a role: the key manager's address for its members, and the address of the enrolment port."""

DEFAULT_TTL_S: Final = 86_400
TTL_BOUNDS_S: Final = (60, 2_592_000)
ENROLLABLE: Final = (Role.AGENT, Role.AGGREGATOR, Role.OPERATOR)
_TOKEN_BYTES: Final = 32
_TOKEN_LENGTHS: Final = (16, 128)
_ASK = "ask the operator for a new enrolment file"


@dataclass(frozen=True)
class Members:
    """The members of one federation.

    Attributes:
        authority: signs certificates.
        store: where tokens and members are kept.
        audit: records every grant.
        gate: decides on calls.
        clock: validity of tokens and certificates.
        lifetime_s: validity of certificates.
        addresses: where a new member of a role reaches the key manager, and where it enrols.
        random_bytes: source of tokens.
    """

    authority: Authority
    store: Store
    audit: AuditLog
    gate: Gate
    clock: Clock
    lifetime_s: int
    addresses: Addresses
    random_bytes: Callable[[int], bytes] = secrets.token_bytes

    async def enrol(self, federation: str, token: str, csr_der: bytes) -> Issued:
        """Certificate for a one-time token; the same token and key get one again until the token expires."""

        async def body(records: Records) -> Issued:
            self._check_federation(federation)
            public_key = parse_signing_request(csr_der)
            digest, key_digest = token_digest(token), hashlib.sha256(key_bytes(public_key)).digest()
            grant = self._usable(await records.token(digest), key_digest)
            identity = self.identity(grant.role, grant.name)
            await refuse_revoked(records, identity)
            await records.bind_token(digest, key_digest)
            return await self._issue(records, Action.ENROL, identity, public_key, grant.server_names)

        async with self.gate.refusals_recorded(ANONYMOUS, Action.ENROL.value):
            return await self.store.run_tx(Action.ENROL.value, body)

    async def renew(self, caller: Identity, csr_der: bytes) -> Issued:
        """Fresh certificate for the caller's own identity and the key in the request."""

        async def body(records: Records) -> Issued:
            member = await records.member(caller)
            if member is None:
                raise UnknownAgent(
                    f"member: expected an enrolled identity, got {caller.uri}",
                    hint=_ASK,
                    context={"identity": caller.uri},
                )
            public_key = parse_signing_request(csr_der)
            return await self._issue(records, Action.RENEW, caller, public_key, member.server_names)

        return await self.gate.decide(caller, Action.RENEW.value, "own certificate", ANY_ROLE, body)

    async def create_token(
        self, caller: Actor, role: Role, name: str, ttl_s: int = 0, server_names: Sequence[str] = ()
    ) -> EnrolmentToken:
        """A one-time enrolment token; only its digest is kept."""
        token = base64.urlsafe_b64encode(self.random_bytes(_TOKEN_BYTES)).rstrip(b"=").decode()

        async def body(records: Records) -> EnrolmentToken:
            identity = self.identity(role, name)
            keymanager, enrolment = self.addresses(role)
            names = check_server_names(server_names, role)
            await refuse_revoked(records, identity)
            now_ms = self.clock.now_ms()
            expires_at_ms = now_ms + _validity_s(ttl_s) * 1000
            await records.put_token(token_digest(token), TokenGrant(role, name, names, expires_at_ms, None), now_ms)
            await self.audit.append(records, actor_name(caller), Action.TOKEN, identity.uri)
            return EnrolmentToken(token, self.authority.pem, expires_at_ms, keymanager, enrolment)

        subject = f"for {role.value} {name[:80]}"
        return await self.gate.decide(caller, Action.TOKEN.value, subject, (Role.OPERATOR,), body)

    def identity(self, role: Role, name: str) -> Identity:
        """The identity of that role and name in this federation.

        Raises: InvalidIdentifier for a bad name or a role that nobody can enrol for.
        """
        if role not in ENROLLABLE:
            raise InvalidIdentifier(
                f"role: expected {', '.join(known.value for known in ENROLLABLE)}, got {role.value}",
                hint="the key manager's own certificate is made by itself",
            )
        return Identity(self.authority.federation, role, name)

    async def _issue(
        self,
        records: Records,
        action: Action,
        identity: Identity,
        public_key: ec.EllipticCurvePublicKey,
        server_names: tuple[str, ...],
    ) -> Issued:
        issued = self.authority.issue(
            identity,
            public_key,
            now_ms=self.clock.now_ms(),
            lifetime_s=self.lifetime_s,
            server_names=server_names,
        )
        await records.put_member(Member(identity, server_names, issued.not_after_ms))
        await self.audit.append(records, identity.uri, action, f"certificate {issued.serial}")
        return issued

    def _check_federation(self, federation: str) -> None:
        if federation != self.authority.federation:
            raise UnknownFederation(
                f"federation: expected {self.authority.federation}, got {federation[:80]!r}",
                hint="use an enrolment file of this key manager's federation",
            )

    def _usable(self, grant: TokenGrant | None, key_digest: bytes) -> TokenGrant:
        if grant is None:
            raise InvalidToken("token: expected one that this key manager made, got an unknown one", hint=_ASK)
        context = {"identity": self.identity(grant.role, grant.name).uri}
        if self.clock.now_ms() >= grant.expires_at_ms:
            raise InvalidToken("token: expected a valid one, got an expired one", hint=_ASK, context=context)
        if grant.key_digest is not None and grant.key_digest != key_digest:
            raise InvalidToken(
                "token: expected an unused one or the key that used it, got another key", hint=_ASK, context=context
            )
        return grant


def token_digest(token: str) -> bytes:
    """What is stored of a token.

    Raises: InvalidToken for a text that no token is.
    """
    shortest, longest = _TOKEN_LENGTHS
    if not token.isascii() or not shortest <= len(token) <= longest:
        raise InvalidToken(
            f"token: expected {shortest} to {longest} ASCII characters, got {len(token)} characters", hint=_ASK
        )
    return hashlib.sha256(b"shelora enrolment token v1\x00" + token.encode()).digest()


def _validity_s(ttl_s: int) -> int:
    shortest, longest = TTL_BOUNDS_S
    seconds = ttl_s or DEFAULT_TTL_S
    if not shortest <= seconds <= longest:
        raise ValueOutOfRange(
            f"token validity: expected {shortest} to {longest} seconds, got {seconds}",
            hint="0 means a day",
        )
    return seconds
