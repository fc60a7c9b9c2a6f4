"""Tensor files in the safetensors format, read without trusting a byte of them and written one tensor at a time.

A file is an 8-byte little-endian header length, a JSON header, then the tensors' bytes without gaps. Whoever reads says
beforehand which tensors there must be; what comes back is only where each of them starts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from shelora.errors import MalformedPayload, RankMismatch, ShapeMismatch, SizeMismatch, StoredBytesCorrupt

FLOAT32: Final = "F32"
INT64: Final = "I64"

PIECE_VALUES: Final = 1 << 20
"""Values of a tensor that are looked at together."""

_DTYPES: Final[dict[str, np.dtype[Any]]] = {FLOAT32: np.dtype("<f4"), INT64: np.dtype("<i8")}
_LENGTH_BYTES: Final = 8
_ALIGNMENT: Final = 8
_HEADER_BYTES: Final = 64 << 10
_HEADER_BYTES_PER_TENSOR: Final = 256
_INTEGER_DIGITS: Final = 19
_SHOWN_CHARACTERS: Final = 60
_SHOWN_NAMES: Final = 3
_METADATA: Final = "__metadata__"


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor has to be.

    Attributes:
        name: key in the file.
        dtype: FLOAT32 or INT64.
        shape: size of every axis; 0 is fine.
        module: name of the module it belongs to, for error messages.
        rank_axis: axis whose size is the sender's LoRA rank, None if none is.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    module: str = ""
    rank_axis: int | None = None

    @property
    def values(self) -> int:
        """Number of values."""
        size = 1
        for axis in self.shape:
            size *= axis
        return size

    @property
    def size_bytes(self) -> int:
        """Bytes of the values."""
        return self.values * _DTYPES[self.dtype].itemsize


def header_limit_bytes(tensors: int) -> int:
    """Longest JSON header accepted for that many tensors."""
    return _HEADER_BYTES + _HEADER_BYTES_PER_TENSOR * tensors


def file_limit_bytes(specs: Sequence[TensorSpec]) -> int:
    """Longest file that can hold these tensors and nothing else."""
    return _LENGTH_BYTES + header_limit_bytes(len(specs)) + sum(spec.size_bytes for spec in specs)


def locate(path: Path, specs: Sequence[TensorSpec]) -> NDArray[np.int64]:
    """Check that a file holds exactly these tensors, and find them. Values are not looked at.

    Args:
        path: the file.
        specs: the tensors wanted, in any order.

    Returns:
        int64[len(specs)], position of every tensor's first byte in the file.

    Raises:
        MalformedPayload: no such header, other names, another dtype, gaps or overlaps.
        ShapeMismatch, RankMismatch: a tensor of another shape.
        SizeMismatch: the file ends early or goes on after the last tensor.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header, start = _header(file, size, len(specs))
    entries = {name: entry for name, entry in header.items() if name != _METADATA}
    _check_names(entries, specs)
    begins = np.array([_check_entry(entries[spec.name], spec) for spec in specs], dtype=np.int64)
    end = _check_contiguous(begins, specs)
    if start + end != size:
        raise SizeMismatch(
            f"tensor file: expected {start + end} bytes by its header, got {size}",
            hint="send the whole file and nothing after it",
        )
    return begins + start


def stored_shapes(path: Path, tensors: int) -> dict[str, tuple[int, ...]]:
    """Shapes by name in a file of that many tensors that this service wrote itself.

    Raises:
        StoredBytesCorrupt: the file holds something else.
    """
    try:
        with path.open("rb") as file:
            header, _ = _header(file, path.stat().st_size, tensors)
        return {name: tuple(int(size) for size in entry["shape"]) for name, entry in header.items()}
    except (MalformedPayload, TypeError, ValueError, KeyError) as error:
        raise StoredBytesCorrupt(
            f"stored tensors {path.name}: expected a tensor file, got something else",
            hint="check the disk and restore the state folder from a backup",
        ) from error


def read_tensor(file: BinaryIO, spec: TensorSpec, offset: int) -> NDArray[Any]:
    """One whole tensor of a located file.

    Raises:
        SizeMismatch: the file ends early.
    """
    return _read(file, spec, offset, spec.values).reshape(spec.shape)


def read_pieces(file: BinaryIO, spec: TensorSpec, offset: int) -> Iterator[NDArray[Any]]:
    """The values of one tensor in order, at most `PIECE_VALUES` at a time; never cut inside a row that is shorter.

    Yields:
        [rows, columns] pieces of a matrix (a row longer than `PIECE_VALUES` comes as one piece), [count] of a vector.

    Raises:
        SizeMismatch: the file ends early.
    """
    width = spec.shape[1] if len(spec.shape) == 2 else 1
    if not spec.values:
        return
    step = max(1, PIECE_VALUES // width)
    itemsize = _DTYPES[spec.dtype].itemsize
    for first in range(0, spec.shape[0], step):
        rows = min(step, spec.shape[0] - first)
        piece = _read(file, spec, offset + first * width * itemsize, rows * width)
        yield piece.reshape(rows, width) if len(spec.shape) == 2 else piece


def write_header(file: BinaryIO, specs: Iterable[TensorSpec]) -> None:
    """Begin a tensor file; the tensors' bytes follow in the same order, each in C order."""
    header: dict[str, Any] = {}
    begin = 0
    for spec in specs:
        end = begin + spec.size_bytes
        header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)


def write_tensor(file: BinaryIO, spec: TensorSpec, values: NDArray[Any]) -> None:
    """Append one tensor's values in its dtype.

    Raises:
        ShapeMismatch: the values have another shape than announced in the header.
    """
    if values.shape != spec.shape:
        raise ShapeMismatch(f"tensor {spec.name}: expected shape {spec.shape}, got {values.shape}")
    file.write(np.ascontiguousarray(values, dtype=_DTYPES[spec.dtype]).data)


def _read(file: BinaryIO, spec: TensorSpec, offset: int, values: int) -> NDArray[Any]:
    array = np.empty(values, dtype=_DTYPES[spec.dtype])
    file.seek(offset)
    wanted = array.data.cast("B") if values else memoryview(b"")
    done = 0
    while done < len(wanted):
        count = file.readinto(wanted[done:])  # type: ignore[attr-defined]  # files opened in "rb" have it
        if not count:
            raise SizeMismatch(f"tensor {spec.name}: expected {len(wanted)} bytes at {offset}, got {done}")
        done += count
    return array


def _header(file: BinaryIO, size: int, tensors: int) -> tuple[dict[str, Any], int]:
    """The parsed header and the position after it; at most `header_limit_bytes` are read."""
    limit = header_limit_bytes(tensors)
    prefix = file.read(_LENGTH_BYTES)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < _LENGTH_BYTES or not 2 <= length <= min(limit, size - _LENGTH_BYTES):
        raise MalformedPayload(
            f"tensor file of {size} bytes: expected a header of 2 to {limit} bytes inside the file, "
            f"got {length if len(prefix) == _LENGTH_BYTES else 'no'} bytes",
            hint="send a safetensors file",
        )
    text = file.read(length)
    try:
        header = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_distinct,
            parse_int=_integer,
            parse_float=_no_number,
            parse_constant=_no_number,
        )
    except (ValueError, RecursionError) as error:
        raise MalformedPayload(
            "tensor file: expected a JSON header of names, shapes and offsets, got something else",
            hint="send a safetensors file",
        ) from error
    if not isinstance(header, dict):
        raise MalformedPayload(f"tensor file: expected a JSON object as header, got a {type(header).__name__}")
    return header, _LENGTH_BYTES + length


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key twice")
    return found


def _integer(text: str) -> int:
    # Python needs quadratic time for long numbers.
    if len(text) > _INTEGER_DIGITS:
        raise ValueError("a number too long")
    return int(text)


def _no_number(_text: str) -> NoReturn:
    raise ValueError("not an integer")


def _check_names(entries: dict[str, Any], specs: Sequence[TensorSpec]) -> None:
    wanted = {spec.name for spec in specs}
    missing, extra = sorted(wanted - entries.keys()), sorted(entries.keys() - wanted)
    if missing or extra:
        raise MalformedPayload(
            f"tensor file: expected {len(wanted)} tensors of the plan, got {len(entries)}; "
            f"missing {_shown(missing)}, not in the plan {_shown(extra)}",
            hint="send exactly the tensors of this plan version",
        )


def _shown(names: list[str]) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(repr(name[:_SHOWN_CHARACTERS]) for name in names[:_SHOWN_NAMES]) + more


def _check_entry(entry: Any, spec: TensorSpec) -> int:
    """First byte of the tensor relative to the end of the header."""
    context = {"tensor": spec.name, "module": spec.module} if spec.module else {"tensor": spec.name}
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise MalformedPayload(
            f"tensor {spec.name}: expected dtype, shape and data_offsets, got another entry", context=context
        )
    if entry["dtype"] != spec.dtype:
        raise MalformedPayload(
            f"tensor {spec.name}: expected dtype {spec.dtype}, got {str(entry['dtype'])[:_SHOWN_CHARACTERS]}",
            hint="convert before saving",
            context=context,
        )
    _check_shape(entry["shape"], spec, context)
    offsets = entry["data_offsets"]
    if not _integers(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != spec.size_bytes or offsets[0] < 0:
        raise MalformedPayload(
            f"tensor {spec.name}: expected offsets that span {spec.size_bytes} bytes, "
            f"got {str(offsets)[:_SHOWN_CHARACTERS]}",
            context=context,
        )
    return int(offsets[0])


def _check_shape(shape: Any, spec: TensorSpec, context: dict[str, str]) -> None:
    if _integers(shape) and tuple(shape) == spec.shape:
        return
    text = f"tensor {spec.name}: expected shape {list(spec.shape)}, got {str(shape)[:_SHOWN_CHARACTERS]}"
    axis = spec.rank_axis
    if axis is not None and _integers(shape) and len(shape) == len(spec.shape):
        others = [size for index, size in enumerate(shape) if index != axis]
        if others == [size for index, size in enumerate(spec.shape) if index != axis]:
            raise RankMismatch(text, hint="register again after changing the LoRA rank", context=context)
    raise ShapeMismatch(text, hint="use the shapes of this plan version and the registered budget", context=context)


def _integers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _check_contiguous(begins: NDArray[np.int64], specs: Sequence[TensorSpec]) -> int:
    """Check that the tensors lie side by side from 0 on; returns the end of the last one."""
    sizes = np.array([spec.size_bytes for spec in specs], dtype=np.int64)
    order = np.lexsort((sizes, begins))
    ends = np.cumsum(sizes[order])
    if not np.array_equal(begins[order], ends - sizes[order]):
        raise MalformedPayload(
            "tensor file: expected the tensors side by side, got gaps or overlaps", hint="save with safetensors"
        )
    return int(ends[-1]) if len(ends) else 0
