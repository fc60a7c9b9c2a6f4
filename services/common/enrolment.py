"""How a member gets its certificate and keeps it fresh: enrolment file, one-time enrolment, renewal."""

from __future__ import annotations

import json
import random
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Final

import structlog

from services.common.addresses import check_address
from services.common.channel import open_channel
from services.common.clock import Clock
from services.common.files import write_atomically
from services.common.identity import Identity, Role
from services.common.keymanager_client import EnrolledCertificate, EnrolmentToken, KeyManagerClient, enrol
from services.common.member_key import check_answer, load_key, load_or_make_key, same_certificate, signing_request
from services.common.retry import retrying
from services.common.tls import IdentityFiles, channel_credentials, channel_credentials_for_enrolment
from shelora.errors import AccessDenied, IdentityConflict, InvalidConfiguration, SheLoraError

GIVE_UP_AFTER_S: Final = 300.0
"""How long `ensure_identity` tries to reach the key manager unless told otherwise."""

RENEW_AT: Final = 2 / 3
"""Part of a certificate's lifetime after which it is renewed."""

_LONGEST_WAIT_S: Final = 15.0
_RENEWAL_WAIT_S: Final = (5.0, 300.0)
# A machine that was asleep or whose clock was set notices within this time that a renewal is due.
_LONGEST_SLEEP_S: Final = 900.0
_MAX_FILE_BYTES: Final = 65_536

_logger = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Enrolment:
    """What a new member needs to know; the operator makes it and hands it over as a JSON file.

    Attributes:
        federation: federation name.
        role: what the member will be.
        name: name inside the role.
        token: the one-time token.
        authority_pem: the federation's root certificate.
        keymanager: where the member reaches the key manager; an aggregator on its membership port.
        enrolment: address of its enrolment port.

    Raises:
        InvalidIdentifier: a bad federation or member name.
        InvalidConfiguration: a bad address.
    """

    federation: str
    role: Role
    name: str
    token: str = field(repr=False)
    authority_pem: str
    keymanager: str
    enrolment: str

    def __post_init__(self) -> None:
        Identity(self.federation, self.role, self.name)
        check_address(self.keymanager)
        check_address(self.enrolment)

    @property
    def identity(self) -> Identity:
        """Who the member will be."""
        return Identity(self.federation, self.role, self.name)

    @classmethod
    def around(cls, token: EnrolmentToken, identity: Identity) -> Enrolment:
        """What to hand to the new member that the key manager made the token for.

        Raises:
            InvalidConfiguration: the key manager named no usable addresses.
        """
        return cls(
            federation=identity.federation,
            role=identity.role,
            name=identity.name,
            token=token.token,
            authority_pem=token.authority_pem,
            keymanager=token.keymanager,
            enrolment=token.enrolment,
        )

    @classmethod
    def load(cls, path: Path) -> Enrolment:
        """Read an enrolment file.

        Raises:
            InvalidConfiguration: missing, unreadable, or with missing, unknown or ill-typed fields.
            InvalidIdentifier: a bad federation or member name.
        """
        expected = {member.name for member in fields(cls)}
        hint = "make a new one: shelora-keymanager token --role agent --name NAME --out FILE"
        try:
            text = path.read_bytes()[: _MAX_FILE_BYTES + 1]
            found = json.loads(text)
        except (OSError, ValueError, RecursionError) as error:
            raise InvalidConfiguration(
                f"enrolment file {path}: expected readable JSON, got {type(error).__name__}", hint=hint
            ) from error
        if not isinstance(found, dict) or set(found) != expected:
            got = sorted(found) if isinstance(found, dict) else type(found).__name__
            raise InvalidConfiguration(
                f"enrolment file {path}: expected the fields {sorted(expected)}, got {got}", hint=hint
            )
        wrong = sorted(name for name, value in found.items() if not isinstance(value, str))
        known_roles = {role.value for role in Role}
        if wrong or found["role"] not in known_roles:
            raise InvalidConfiguration(
                f"enrolment file {path}: expected texts and a role out of {sorted(known_roles)}, "
                f"got other values in {wrong or ['role']}",
                hint=hint,
            )
        return cls(**{**found, "role": Role(found["role"])})

    def save(self, path: Path) -> None:
        """Write the enrolment file with mode 0600: whoever reads it can become this member.

        Readers see the file that was there before or the whole new one.

        Raises:
            InvalidConfiguration: nothing can be written there.
            StorageFull: the disk takes no more.
        """
        content = json.dumps({**asdict(self), "role": self.role.value}, indent=2, sort_keys=True)
        try:
            write_atomically(path, content.encode() + b"\n", mode=0o600)
        except OSError as error:
            raise InvalidConfiguration(
                f"enrolment file {path}: expected a place to write, got {error.strerror or type(error).__name__}",
                hint="mount the folder, not the single file, and let this user write into it",
            ) from error


async def ensure_identity(
    folder: Path,
    enrolment_file: Path | None,
    clock: Clock,
    *,
    give_up_after_s: float = GIVE_UP_AFTER_S,
    rng: random.Random | None = None,
    on_error: Callable[[SheLoraError], None] = lambda _error: None,
) -> IdentityFiles:
    """Make sure that a folder holds a usable identity; enrol if it does not.

    Safe to repeat after a crash at any point: a private key that is already there is used again, and the key manager
    answers the same token and key again until the token expires.

    Args:
        folder: identity folder of the member.
        enrolment_file: what the operator handed over; None, or a missing file, is fine once the member is enrolled.
        clock: decides whether a certificate has expired.
        give_up_after_s: how long to go on while the key manager cannot be reached.
        rng: jitter of the waits; None for one seeded by the system.
        on_error: told of every failure that is tried again.

    Returns:
        The complete identity.

    Raises:
        InvalidConfiguration: not enrolled (or expired) and no enrolment file; broken files.
        IdentityConflict: the folder belongs to another member or another federation than the enrolment file names.
        InvalidToken, AgentRevoked, VersionMismatch: the key manager refused.
        PeerUnreachable: no answer within `give_up_after_s`.
    """
    files = IdentityFiles(folder)
    enrolment = _needed_enrolment(files, enrolment_file, clock.now_ms())
    if enrolment is None:
        return files
    key = load_or_make_key(files)
    jitter = rng or random.Random()  # noqa: S311 - spreads waits, protects nothing
    answer = await _enrol(enrolment, signing_request(key), clock, give_up_after_s, jitter, on_error)
    check_answer(answer, key, enrolment.identity, enrolment.authority_pem)
    files.write_certificate(answer.certificate_pem.encode(), answer.authority_pem.encode())
    _logger.info("enrolled", identity=enrolment.identity.uri, not_after_ms=answer.not_after_ms)
    return files


async def renew_identity(files: IdentityFiles, keymanager_address: str, clock: Clock) -> int:
    """Replace a certificate by a fresh one for the same key.

    Args:
        files: a complete identity whose certificate is still valid.
        keymanager_address: a port of the key manager that serves members.
        clock: for the log only.

    Returns:
        End of the new certificate's validity in milliseconds since the Unix epoch.

    Raises:
        AgentRevoked: the identity was revoked.
        PeerUnreachable: the key manager cannot be reached, or refuses the certificate in the TLS handshake.
        IdentityConflict: the answer is not a certificate for this key, identity and authority; nothing was written.
    """
    key = load_key(files)
    channel = open_channel(keymanager_address, channel_credentials(files))
    try:
        answer = await KeyManagerClient(channel).renew_certificate(signing_request(key))
    finally:
        await channel.close()
    check_answer(answer, key, files.identity(), files.authority.read_text())
    files.write_certificate(answer.certificate_pem.encode(), answer.authority_pem.encode())
    remaining_s = (answer.not_after_ms - clock.now_ms()) // 1000
    _logger.info("certificate renewed", identity=files.identity().uri, valid_for_s=remaining_s)
    return answer.not_after_ms


async def renew_forever(
    files: IdentityFiles,
    keymanager_address: str,
    clock: Clock,
    *,
    on_renewed: Callable[[], Awaitable[None]] | None = None,
    rng: random.Random | None = None,
) -> None:
    """Renew at two thirds of every certificate's lifetime, for as long as the task runs.

    While the key manager is away it goes on trying, more often the closer the end comes, at most every five seconds.

    Args:
        files: a complete identity.
        keymanager_address: a port of the key manager that serves members.
        clock: when a renewal is due.
        on_renewed: awaited after each renewal; clients open new channels there, servers need nothing.
        rng: jitter; None for one seeded by the system.

    Raises:
        AgentRevoked, RoleDenied: the key manager refuses this identity for good.
    """
    jitter = rng or random.Random()  # noqa: S311 - spreads load, protects nothing
    while True:
        begin_ms, end_ms = files.validity_ms()
        remaining_s = (begin_ms + (end_ms - begin_ms) * RENEW_AT - clock.now_ms()) / 1000
        if remaining_s > 0:
            await clock.sleep(min(remaining_s, _LONGEST_SLEEP_S))
            continue
        try:
            await renew_identity(files, keymanager_address, clock)
        except AccessDenied:
            raise
        except SheLoraError as error:
            shortest_s, longest_s = _RENEWAL_WAIT_S
            wait_s = min(max((end_ms - clock.now_ms()) / 1000 / 20, shortest_s), longest_s) * jitter.uniform(0.8, 1.2)
            expired = clock.now_ms() >= end_ms
            _logger.warning("renewal failed", code=error.code, reason=str(error), expired=expired, next_try_s=wait_s)
            await clock.sleep(wait_s)
            continue
        if on_renewed is not None:
            await on_renewed()


async def _enrol(
    enrolment: Enrolment,
    csr_der: bytes,
    clock: Clock,
    give_up_after_s: float,
    rng: random.Random,
    on_error: Callable[[SheLoraError], None],
) -> EnrolledCertificate:
    channel = open_channel(enrolment.enrolment, channel_credentials_for_enrolment(enrolment.authority_pem.encode()))

    def tell(error: SheLoraError, wait_s: float) -> None:
        _logger.info(
            "key manager does not answer yet", address=enrolment.enrolment, code=error.code, next_try_s=round(wait_s, 1)
        )
        on_error(error)

    try:
        return await retrying(
            lambda: enrol(channel, enrolment.federation, enrolment.token, csr_der),
            clock=clock,
            rng=rng,
            until_s=clock.monotonic_s() + give_up_after_s,
            longest_wait_s=_LONGEST_WAIT_S,
            on_retry=tell,
        )
    finally:
        await channel.close()


def _needed_enrolment(files: IdentityFiles, enrolment_file: Path | None, now_ms: int) -> Enrolment | None:
    """What to enrol with, or None when the identity in the folder is usable as it is."""
    enrolment = None
    if enrolment_file is not None and (enrolment_file.exists() or not files.complete()):
        enrolment = Enrolment.load(enrolment_file)
    state = "no certificate"
    if files.complete():
        _check_owner(files, enrolment)
        if now_ms < files.validity_ms()[1]:
            return None
        state = "an expired certificate"
    if enrolment is None:
        raise InvalidConfiguration(
            f"identity folder {files.folder}: expected a valid certificate or an enrolment file, got {state}",
            hint="ask the operator for an enrolment file (shelora-keymanager token) and name it in the configuration",
        )
    return enrolment


def _check_owner(files: IdentityFiles, enrolment: Enrolment | None) -> None:
    if enrolment is None:
        return
    found = files.identity()
    if found != enrolment.identity:
        raise IdentityConflict(
            f"identity folder {files.folder}: expected {enrolment.identity.uri}, got {found.uri}",
            hint="give every member its own folder; delete the folder to enrol it anew",
        )
    if not same_certificate(files.authority.read_text(), enrolment.authority_pem):
        raise IdentityConflict(
            f"identity folder {files.folder}: expected the authority of the enrolment file, got another one",
            hint="the federation's key manager was set up anew: delete the folder to enrol with the new one",
        )
