"""Key epochs on the agent: fetched once, kept sealed on disk, opened in memory only."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import structlog

from services.client_agent.state import AgentState, write_file
from services.common.keymanager_client import FetchedEpoch, open_secrets
from services.common.sealing import SealingKey
from shelora.errors import CorruptState, DigestMismatch, MalformedInput, StoredBytesCorrupt, UnknownEpoch
from shelora.he.parameters import CkksParameters
from shelora.he.secret import CkksContext, Decryptor, Encryptor, PublicKey, SecretKey
from shelora.plan import FederationSeed

log = structlog.get_logger(__name__)


@dataclass(frozen=True, eq=False)
class EpochKeys:
    """All an agent needs of one epoch; lives in memory only."""

    number: int
    parameters: CkksParameters
    encryptor: Encryptor
    decryptor: Decryptor
    seed: FederationSeed


class KeyRing:
    """Epoch keys by number, from memory, from disk, or from the key manager.

    Once an epoch was fetched the agent works on while the key manager is away, even through restarts.
    """

    def __init__(
        self,
        state: AgentState,
        federation: str,
        agent: str,
        fetch: Callable[[int, bytes], Awaitable[FetchedEpoch]],
        threads: int,
    ) -> None:
        """`fetch(number, hpke_public_key)` asks the key manager for an epoch with its secrets sealed to that key."""
        self._state = state
        self._federation = federation
        self._agent = agent
        self._fetch = fetch
        self._threads = threads
        self._open: dict[int, EpochKeys] = {}
        self._lock = asyncio.Lock()

    async def epoch(self, number: int) -> EpochKeys:
        """Keys of one epoch.

        Raises:
            UnknownEpoch: no such epoch, or its secrets are gone.
            PeerUnreachable: it was never fetched and the key manager does not answer.
            DigestMismatch: this machine's library derives other parameters than the key manager's.
        """
        async with self._lock:
            if number not in self._open:
                self._open[number] = await self._from_disk(number) or await self._from_keymanager(number)
            return self._open[number]

    def close(self) -> None:
        """Stop the HE threads and forget all keys."""
        for keys in self._open.values():
            keys.encryptor.close()
            keys.decryptor.close()
        self._open.clear()

    async def _from_disk(self, number: int) -> EpochKeys | None:
        """Stored keys, None when there are none that open."""
        try:
            stored = self._load(number)
            return None if stored is None else await asyncio.to_thread(self._unlock, stored)
        except (CorruptState, MalformedInput) as error:
            log.warning("stored keys do not open, fetching them again", epoch=number, code=error.code)
            return None

    async def _from_keymanager(self, number: int) -> EpochKeys:
        fetched = await self._fetch(number, self._sealing_key().public_bytes())
        if not fetched.sealed_secrets:
            raise UnknownEpoch(
                f"the key manager gave no secrets for epoch {fetched.number} ({fetched.state})",
                hint="ask the operator which epoch is current",
            )
        keys = await asyncio.to_thread(self._unlock, fetched)
        self._store(fetched)
        return keys

    def _unlock(self, fetched: FetchedEpoch) -> EpochKeys:
        secret_bytes, seed_bytes = open_secrets(
            fetched.sealed_secrets, self._sealing_key(), self._federation, fetched.number, self._agent
        )
        context = CkksContext.from_parameters(fetched.parameters)
        public, secret = PublicKey(fetched.public_key), SecretKey(secret_bytes)
        return EpochKeys(
            fetched.number,
            fetched.parameters,
            Encryptor(context, public, self._threads),
            Decryptor(context, public, secret, self._threads),
            FederationSeed(seed_bytes),
        )

    def _sealing_key(self) -> SealingKey:
        path: Path = self._state.sealing_key
        if not path.exists():
            write_file(path, SealingKey.generate().to_bytes())
        return SealingKey.from_bytes(path.read_bytes())

    def _store(self, fetched: FetchedEpoch) -> None:
        folder = self._state.epoch(fetched.number)
        parameters = asdict(fetched.parameters)
        self._state.write_json(
            folder / "epoch.json",
            {"state": fetched.state, "created_at_ms": fetched.created_at_ms, "parameters": parameters},
        )
        write_file(folder / "public", fetched.public_key)
        write_file(folder / "sealed", fetched.sealed_secrets)

    def _load(self, number: int) -> FetchedEpoch | None:
        folder = self._state.root / "epochs" / str(number)
        if number < 1 or not (folder / "sealed").exists():
            return None
        header = self._state.read_json(folder / "epoch.json")
        try:
            return FetchedEpoch(
                federation=self._federation,
                number=number,
                state=str(header["state"]),
                parameters=CkksParameters(**header["parameters"]),
                public_key=(folder / "public").read_bytes(),
                sealed_secrets=(folder / "sealed").read_bytes(),
                created_at_ms=int(header["created_at_ms"]),
            )
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise StoredBytesCorrupt(f"epoch {number} in the agent's state is not whole") from error


def check_parameters(keys: EpochKeys, digest: bytes) -> None:
    """Refuse a plan made for another parameter set.

    Raises: DigestMismatch naming both digests.
    """
    if keys.parameters.digest() != digest:
        raise DigestMismatch(
            f"the plan was made for CKKS parameters {digest.hex()[:16]}, epoch {keys.number} has "
            f"{keys.parameters.digest().hex()[:16]}",
            hint="create the federation with the parameters of its key epoch (shelora federation create does)",
        )
