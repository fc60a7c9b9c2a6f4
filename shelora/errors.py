"""Every error the project raises on purpose, split by who has to act.

SheLoraError
├── MalformedInput        the caller sent something that can never be right
│   ├── ShapeMismatch, RankMismatch, NonFiniteValue, ValueOutOfRange, ResidueOutOfRange
│   ├── SizeMismatch, ChecksumMismatch, PayloadTooLarge, MalformedPayload
│   └── InvalidConfiguration, InvalidIdentifier, InvalidPlan, UnsafePlan
├── NotFound              UnknownFederation, UnknownAgent, UnknownRound, UnknownEpoch, UnknownUpload, UnknownBlob
├── Conflict              ConflictingResend, FederationExists, IdentityConflict
├── WrongState            WrongPhase, WrongEpoch, StalePlan, DigestMismatch, NotInCohort, VersionMismatch,
│                         ModelMismatch, OffsetMismatch, FederationEnded
├── Exhausted             StorageFull, QuotaExceeded
├── AccessDenied          RoleDenied, InvalidToken, AgentRevoked
├── NotAuthenticated
├── Unavailable           Draining, PeerUnreachable
├── CorruptState          StoredBytesCorrupt
└── InternalFault         SelfTestFailed
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class SheLoraError(Exception):
    """Base of all errors raised on purpose.

    Attributes:
        code: stable identifier in snake_case, carried over the wire; unique per class.
        retryable: whether the same call may succeed later without any change.
        message: what happened, with what was expected and what came.
        hint: what to do next; may be empty.
        context: identifiers (agent, round, module, ...) that locate the failure; never secret values.
    """

    code: ClassVar[str] = "shelora_error"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str = "", context: Mapping[str, str] | None = None) -> None:
        """Store the text and the identifiers."""
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.context: dict[str, str] = dict(context or {})

    def __str__(self) -> str:
        """Message, then the hint when there is one."""
        return f"{self.message} ({self.hint})" if self.hint else self.message


class MalformedInput(SheLoraError):
    """The input can never be accepted as it is."""

    code = "malformed_input"


class ShapeMismatch(MalformedInput):
    """An array has another shape than the plan says."""

    code = "shape_mismatch"


class RankMismatch(MalformedInput):
    """A LoRA rank differs from the registered one or is impossible for the module."""

    code = "rank_mismatch"


class NonFiniteValue(MalformedInput):
    """NaN or infinity where a finite number is required."""

    code = "non_finite_value"


class ValueOutOfRange(MalformedInput):
    """A finite number outside its documented bounds."""

    code = "value_out_of_range"


class ResidueOutOfRange(MalformedInput):
    """A ciphertext residue is not below the modulus."""

    code = "residue_out_of_range"


class SizeMismatch(MalformedInput):
    """A payload has another length than its header or its layout says."""

    code = "size_mismatch"


class ChecksumMismatch(MalformedInput):
    """Bytes do not match the checksum sent with them."""

    code = "checksum_mismatch"


class PayloadTooLarge(MalformedInput):
    """A payload is longer than anything the plan allows."""

    code = "payload_too_large"


class MalformedPayload(MalformedInput):
    """Bytes that do not parse as the announced format."""

    code = "malformed_payload"


class InvalidConfiguration(MalformedInput):
    """A configuration value or file cannot be used."""

    code = "invalid_configuration"


class InvalidIdentifier(MalformedInput):
    """An identifier breaks the rules for identifiers."""

    code = "invalid_identifier"


class InvalidPlan(MalformedInput):
    """A plan or federation specification contradicts itself."""

    code = "invalid_plan"


class UnsafePlan(MalformedInput):
    """A plan that works but gives away what it should protect; whoever runs it may allow it."""

    code = "unsafe_plan"


class NotFound(SheLoraError):
    """The named thing does not exist here."""

    code = "not_found"


class UnknownFederation(NotFound):
    """No such federation."""

    code = "unknown_federation"


class UnknownAgent(NotFound):
    """The agent is not registered (or not enrolled)."""

    code = "unknown_agent"


class UnknownRound(NotFound):
    """No such round, or nothing published for it."""

    code = "unknown_round"


class UnknownEpoch(NotFound):
    """No such key epoch."""

    code = "unknown_epoch"


class UnknownUpload(NotFound):
    """No such upload."""

    code = "unknown_upload"


class UnknownBlob(NotFound):
    """No such blob."""

    code = "unknown_blob"


class Conflict(SheLoraError):
    """The same identity already stands for something else."""

    code = "conflict"


class ConflictingResend(Conflict):
    """An upload was sent again with other bytes."""

    code = "conflicting_resend"


class FederationExists(Conflict):
    """A federation of that name exists with another specification."""

    code = "federation_exists"


class IdentityConflict(Conflict):
    """An enrolled or registered identity was claimed again with other properties."""

    code = "identity_conflict"


class WrongState(SheLoraError):
    """Right request, wrong moment."""

    code = "wrong_state"


class WrongPhase(WrongState):
    """The round is not in the phase that takes this request."""

    code = "wrong_phase"


class WrongEpoch(WrongState):
    """Made for another key epoch."""

    code = "wrong_epoch"


class StalePlan(WrongState):
    """Made for another plan version."""

    code = "stale_plan"


class DigestMismatch(WrongState):
    """Both sides derived different parameters or layouts."""

    code = "digest_mismatch"


class NotInCohort(WrongState):
    """The agent does not belong to this round's cohort."""

    code = "not_in_cohort"


class VersionMismatch(WrongState):
    """The two sides run incompatible software."""

    code = "version_mismatch"


class ModelMismatch(WrongState):
    """The agent's base model or LoRA targets differ from the federation's."""

    code = "model_mismatch"


class OffsetMismatch(WrongState):
    """A resumed upload continues at another offset than the staged bytes end."""

    code = "offset_mismatch"
    retryable = True


class FederationEnded(WrongState):
    """The federation is finished or stopped."""

    code = "federation_ended"


class Exhausted(SheLoraError):
    """A limited resource is used up."""

    code = "exhausted"
    retryable = True


class StorageFull(Exhausted):
    """The disk or the database takes no more."""

    code = "storage_full"


class QuotaExceeded(Exhausted):
    """A configured limit is reached."""

    code = "quota_exceeded"


class AccessDenied(SheLoraError):
    """The caller is known and may not do this."""

    code = "access_denied"


class RoleDenied(AccessDenied):
    """The certificate's role may not call this."""

    code = "role_denied"


class InvalidToken(AccessDenied):
    """The enrolment token is unknown, used or expired."""

    code = "invalid_token"


class AgentRevoked(AccessDenied):
    """The identity was revoked."""

    code = "agent_revoked"


class NotAuthenticated(SheLoraError):
    """No usable client certificate."""

    code = "not_authenticated"


class Unavailable(SheLoraError):
    """Nobody answers now."""

    code = "unavailable"
    retryable = True


class Draining(Unavailable):
    """The service is shutting down."""

    code = "draining"


class PeerUnreachable(Unavailable):
    """The other side cannot be reached in time."""

    code = "peer_unreachable"


class CorruptState(SheLoraError):
    """Stored state contradicts itself."""

    code = "corrupt_state"


class StoredBytesCorrupt(CorruptState):
    """Stored bytes fail their digest."""

    code = "stored_bytes_corrupt"


class InternalFault(SheLoraError):
    """A defect on this side; details stay in this side's log under the correlation id."""

    code = "internal_fault"


class SelfTestFailed(InternalFault):
    """A start-up self-test found a result that must not happen."""

    code = "self_test_failed"


def error_classes() -> dict[str, type[SheLoraError]]:
    """All classes of the tree by their code."""
    found: dict[str, type[SheLoraError]] = {}
    queue: list[type[SheLoraError]] = [SheLoraError]
    while queue:
        cls = queue.pop()
        found[cls.code] = cls
        queue.extend(cls.__subclasses__())
    return found
