"""What the service needs from outside: the computations and the checks of uploaded payloads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from services.aggregator.domain import BasisResult, CohortMember, ExpectedPayload
from services.common.blobs import Blob
from services.common.digests import Buffer
from shelora.he.parameters import CkksParameters
from shelora.plan.plan import Plan


class Compute(Protocol):
    """Computations over blobs. Same inputs give an equally valid result; inputs are never changed.

    Every result is written under the key or prefix that the caller gives, which is fresh for every attempt: a result
    that the caller never records is an orphan and is collected at the next start.
    """

    async def compute_basis(self, plan: Plan, members: Sequence[CohortMember], prefix: str) -> BasisResult:
        """Compute the common basis of all members' left factors and each member's projection onto it.

        Writes `<prefix>/basis.safetensors` ("<module index>.basis" float32[m, s]) and per member
        `<prefix>/projection-<agent>.safetensors` ("<module index>.projection" float32[s, r]).
        """
        ...

    async def fold_residues(
        self, total: Blob | None, terms: Sequence[Blob], blocks: int, parameters: CkksParameters, key: str
    ) -> Blob:
        """Write a new blob of exactly `blocks` ciphertext blocks: `total` (None is zero) plus all terms, modulo q.

        `total` has `blocks` blocks; a term may be shorter and then counts as followed by zeros.
        """
        ...

    async def compute_average(self, plan: Plan, basis: Blob, members: Sequence[CohortMember], key: str) -> Blob:
        """Write the published average of the given (counted) members.

        "<module index>.basis" float32[m, s], and "<module index>.plain" float32[s, n - min k] = sum of w_i R_i Q_i over
        the plain columns, min k over the given members; not divided by anything.
        """
        ...

    async def rank_votes(self, plan: Plan, votes: Sequence[Blob], columns: Sequence[int], key: str) -> Blob:
        """Write the ranked tokens per module, "<module index>.token" int64[at most columns[module index]]."""
        ...


class Arriving(Protocol):
    """Looks at a payload while it comes.

    Attributes:
        good_bytes: length of its beginning that need not be checked again.
    """

    good_bytes: int

    def add(self, offset: int, data: Buffer) -> None:
        """Look at bytes that have just been staged; in a thread, never twice at once. Offset 0 begins again."""
        ...


class PayloadChecks(Protocol):
    """Decides whether uploaded bytes are what the plan says."""

    def size_limit_bytes(self, expected: ExpectedPayload) -> int:
        """Most bytes such a payload can have; announced sizes beyond it are refused before any byte is taken."""
        ...

    def arriving(self, expected: ExpectedPayload) -> Arriving:
        """What looks at such a payload while it comes."""
        ...

    async def check(self, path: Path, expected: ExpectedPayload, good_bytes: int = 0) -> int:
        """Parse and validate a file, answer its bytes; raises a MalformedInput subclass that says why.

        The first `good_bytes` bytes were found right while they came.
        """
        ...
