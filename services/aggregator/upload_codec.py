"""Messages of an upload, read without copying the bytes they bring.

protobuf copies the bytes of a chunk twice before anybody sees them: into the message and out of it. A chunk whose
fields come in order, each once, as serializers write them, is read where it lies; everything else is left to protobuf.
"""

from __future__ import annotations

from typing import Final, TypeAlias

from services.aggregator.domain import Piece
from shelora.v1 import aggregator_pb2

_CHUNK: Final = 0x12
"""Tag of `UploadRequest.chunk`, and of `Chunk.data` within."""

_OFFSET: Final = 0x08
_CRC32: Final = 0x1D
_CRC32_BYTES: Final = 5
_NUMBER_BYTES: Final = 10
_LENGTH_BYTES: Final = 5


UploadPart: TypeAlias = "aggregator_pb2.UploadHeader | Piece | None"
"""What a message of an upload brings; None when it brings neither."""


def read_part(message: bytes) -> UploadPart:
    """Read a `shelora.v1.UploadRequest`.

    Raises:
        DecodeError: these bytes are no such message.
    """
    return _chunk_in_place(message) or _part(aggregator_pb2.UploadRequest.FromString(message))


def _part(request: aggregator_pb2.UploadRequest) -> UploadPart:
    part = request.WhichOneof("part")
    if part == "header":
        return request.header
    chunk = request.chunk
    return None if part is None else Piece(chunk.offset, chunk.data, chunk.crc32)


def _chunk_in_place(message: bytes) -> Piece | None:
    """The chunk if the message is laid out as serializers do it: offset (unless 0), data, CRC-32, nothing else."""
    size = len(message)
    try:
        if message[0] != _CHUNK:
            return None
        length, at = _varint(message, 1, _LENGTH_BYTES)
        if length != size - at:
            return None
        offset = 0
        if message[at] == _OFFSET:
            offset, at = _varint(message, at + 1, _NUMBER_BYTES)
        if message[at] != _CHUNK:
            return None
        length, at = _varint(message, at + 1, _LENGTH_BYTES)
        end = at + length
        if end + _CRC32_BYTES != size or message[end] != _CRC32:
            return None
    except (IndexError, ValueError):
        return None
    return Piece(offset, memoryview(message)[at:end], int.from_bytes(message[end + 1 :], "little"))


def _varint(message: bytes, at: int, longest: int) -> tuple[int, int]:
    """The number that begins there and where the next field begins.

    Raises:
        IndexError: the message ends within the number.
        ValueError: the number has too many bytes or bits.
    """
    value = 0
    for index in range(longest):
        byte = message[at + index]
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80 and value < 1 << 64:
            return value, at + index + 1
    raise ValueError("an unusual number")
