"""What an agent keeps on disk between phases, so that it may die at any line and go on where it was.

    state_dir/
      identity/                        key, certificate, CA certificate (services.common.tls)
      hpke.key                         sealing key, mode 0600
      epochs/<epoch>/                  sealed secrets as received, public key, parameters
      plans/<version>/                 column priorities; the sent sensitivities or votes
      rounds/<round>/                  own factors in the clear, payloads as sent and received, figures
      adapters/round-<round>/          PEFT adapters; round-000 is the start
      adapters/state-<round>.safetensors  the newest one at full precision, with the residual kept beside it
      state.json                       last round whose average was applied
      budget.json, link.json           encrypted columns as first resolved; measured upload rate
      lock                             held while an agent runs

Every file appears whole or not at all (temporary file, fsync, rename; figures and the measured upload rate go without
fsync, a power cut may undo them). A payload is written before its first byte is sent: a
restarted agent sends the same bytes, which the aggregator recognises.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as render_tensors

from services.client_agent.round import LocalUpdate
from services.common.files import write_atomically
from shelora.errors import InvalidConfiguration, StoredBytesCorrupt
from shelora.lora import Factors

Float64 = npt.NDArray[np.float64]


class AgentState:
    """Folder of one agent in one federation."""

    def __init__(self, root: Path) -> None:
        """Use (and create, mode 0700) the folder."""
        self.root = root
        root.mkdir(mode=0o700, parents=True, exist_ok=True)

    @property
    def identity(self) -> Path:
        """Folder with key and certificates."""
        return self.root / "identity"

    @property
    def sealing_key(self) -> Path:
        """File with the agent's HPKE key."""
        return self.root / "hpke.key"

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the folder for this process; the lock ends with the process, however it ends.

        Raises: InvalidConfiguration when another agent works here.
        """
        with (self.root / "lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InvalidConfiguration(
                    f"another agent works in {self.root}", hint="stop it, or give every agent a state_dir of its own"
                ) from None
            yield

    def epoch(self, number: int) -> Path:
        """Folder of a key epoch."""
        return self._folder("epochs", str(number))

    def plan(self, version: int) -> Path:
        """Folder of a plan version."""
        return self._folder("plans", str(version))

    def round(self, number: int) -> Path:
        """Folder of a round."""
        return self._folder("rounds", str(number))

    def figures(self, number: int) -> Path:
        """File with a round's figures; the folder is made when it is written."""
        return self.root / "rounds" / str(number) / "figures.json"

    def adapter(self, round_number: int) -> Path:
        """Folder of the PEFT adapter after a round; 0 is the start. Not created here."""
        return self.root / "adapters" / f"round-{round_number:03d}"

    def adapter_rounds(self) -> list[int]:
        """Rounds with a saved adapter, ascending."""
        found = (self.root / "adapters").glob("round-[0-9]*")
        return sorted(int(folder.name.removeprefix("round-")) for folder in found if folder.name[6:].isdigit())

    def applied_round(self) -> int:
        """Last round whose average was applied and saved; 0 before the first."""
        return int(self.read_json(self.root / "state.json").get("applied_round", 0))

    def set_applied_round(self, number: int) -> None:
        """Remember it."""
        self.write_json(self.root / "state.json", {"applied_round": number})

    def adapter_state(self, round_number: int) -> Path:
        """File with the adapter after a round at full precision; training goes on from it."""
        return self.root / "adapters" / f"state-{round_number:03d}.safetensors"

    def forget_rounds(self, last: int) -> None:
        """Delete factors and payloads of rounds up to `last` and older full-precision adapters; figures stay."""
        for folder in (self.root / "rounds").glob("[0-9]*"):
            if int(folder.name) <= last:
                for path in folder.glob("*"):
                    if path.name != "figures.json":
                        path.unlink()
        for number in range(last):
            self.adapter_state(number).unlink(missing_ok=True)

    def save_update(self, round_number: int, update: LocalUpdate, metadata: Mapping[str, Any]) -> None:
        """Keep the agent's own factors, float64 in true column order, with what belongs to them."""
        tensors = update_tensors(update)
        write_file(
            self.round(round_number) / "factors.safetensors",
            render_tensors(tensors, metadata={"json": json.dumps(dict(metadata))}),
        )

    def load_update(self, round_number: int) -> tuple[LocalUpdate, dict[str, Any]] | None:
        """Own factors of a round with their metadata, or None if there are none.

        Raises: StoredBytesCorrupt when the file does not parse.
        """
        path = self.root / "rounds" / str(round_number) / "factors.safetensors"
        if not path.exists():
            return None
        tensors = StoredTensors(path)
        count = sum(name.endswith(".left") for name in tensors)
        dense = sum(name.startswith("dense.") for name in tensors)
        update = LocalUpdate(
            tuple(Factors(tensors[f"{index}.left"], tensors[f"{index}.right"]) for index in range(count)),
            tuple(tensors[f"dense.{index}"] for index in range(dense)),
        )
        return update, json.loads(tensors.metadata["json"])

    @staticmethod
    def read_json(path: Path) -> dict[str, Any]:
        """A JSON object, empty if the file is not there.

        Raises: StoredBytesCorrupt when it does not parse.
        """
        try:
            found = json.loads(path.read_text())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise StoredBytesCorrupt(f"{path.name} in the agent's state is not JSON", hint="delete the file") from error
        if not isinstance(found, dict):
            raise StoredBytesCorrupt(f"{path.name} in the agent's state is not a JSON object", hint="delete the file")
        return found

    @staticmethod
    def write_json(path: Path, value: Mapping[str, Any], *, synced: bool = True) -> None:
        """Write a JSON object whole; see `write_file`."""
        write_file(path, json.dumps(dict(value), indent=1, sort_keys=True).encode(), synced=synced)

    def _folder(self, kind: str, name: str) -> Path:
        folder = self.root / kind / name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder


def update_tensors(update: LocalUpdate) -> dict[str, Float64]:
    """An update as named tensors: "<module>.left", "<module>.right", "dense.<tensor>"."""
    tensors: dict[str, Float64] = {}
    for index, factors in enumerate(update.factors):
        tensors[f"{index}.left"] = np.ascontiguousarray(factors.left)
        tensors[f"{index}.right"] = np.ascontiguousarray(factors.right)
    for index, tensor in enumerate(update.dense):
        tensors[f"dense.{index}"] = np.ascontiguousarray(tensor)
    return tensors


class StoredTensors(Mapping[str, npt.NDArray[Any]]):
    """Tensors of a safetensors file, each read when it is asked for; the file may be replaced meanwhile."""

    def __init__(self, path: Path) -> None:
        """Map the file.

        Raises: StoredBytesCorrupt when it does not parse.
        """
        try:
            self._file = cast("Any", safe_open(path, framework="numpy"))
        except SafetensorError as error:
            raise StoredBytesCorrupt(
                f"{path.name} in the agent's state does not parse", hint="delete the file"
            ) from error
        self._names = dict.fromkeys(self._file.keys())

    @property
    def metadata(self) -> Mapping[str, str]:
        """What was written beside the tensors."""
        return self._file.metadata() or {}

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        """Read one tensor; a copy."""
        if name not in self._names:
            raise KeyError(name)
        tensor: npt.NDArray[Any] = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        """Names."""
        return iter(self._names)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._names)


def load_tensors(path: Path) -> StoredTensors:
    """Tensors of a safetensors file of this agent's own.

    Raises: StoredBytesCorrupt when the file does not parse.
    """
    return StoredTensors(path)


def write_tensors(path: Path, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write tensors whole."""
    write_file(path, render_tensors(dict(tensors)))


def write_file(path: Path, data: bytes | memoryview, *, synced: bool = True) -> None:
    """Write a file that only this agent may read, whole or not at all; without `synced` a power cut may undo it."""
    write_atomically(path, data, mode=0o600, synced=synced)
