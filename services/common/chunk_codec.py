"""Messages that bring pieces of a payload, written and read without protobuf's copies of the bytes.

protobuf copies the bytes of a chunk several times on their way into a serialized message and out of it. Here they
are put between the few bytes around them once, and a chunk whose fields come in order, each once, as serializers write
them, is read where it lies. Everything else is left to protobuf. `UploadRequest` and `DownloadResponse` are laid out
alike: a header first, then chunks.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final, TypeAlias

import grpc
from google.protobuf.message import Message

from services.common.transfer import Piece
from shelora.v1 import aggregator_pb2, aggregator_pb2_grpc

ROUNDS: Final = aggregator_pb2.DESCRIPTOR.services_by_name["RoundService"].full_name
"""The service whose calls carry payloads."""

_CHUNK: Final = 0x12
"""Tag of `chunk` in both messages, and of `Chunk.data` within."""

_OFFSET: Final = 0x08
_CRC32: Final = 0x1D
_CRC32_BYTES: Final = 5
_POSITION_BITS: Final = 64
_HEAD: Final = re.compile(
    rb"\x12([\x80-\xff]{0,4}[\x00-\x7f])(?:\x08([\x80-\xff]{0,9}[\x00-\x7f]))?\x12([\x80-\xff]{0,4}[\x00-\x7f])"
)
"""Everything before the data: length of the chunk, its offset, length of the data, each a varint after its tag."""


Part: TypeAlias = "aggregator_pb2.UploadHeader | aggregator_pb2.DownloadHeader | Piece | None"
"""What a message brings; None when it brings neither header nor chunk."""

RoundsStub: TypeAlias = aggregator_pb2_grpc.RoundServiceStub
"""The calls of a round, as `rounds_stub` makes them."""


def serialize(message: Message | Piece) -> bytes:
    """The bytes of a message, a piece being one that brings a chunk."""
    if not isinstance(message, Piece):
        return message.SerializeToString()
    offset = b"" if message.offset == 0 else bytes((_OFFSET, *_to_varint(message.offset)))
    size = len(message.data)
    within = bytes((*offset, _CHUNK, *_to_varint(size)))
    before = bytes((_CHUNK, *_to_varint(len(within) + size + _CRC32_BYTES)))
    after = bytes((_CRC32, *message.crc32.to_bytes(_CRC32_BYTES - 1, "little")))
    return b"".join((before, within, message.data, after))


def reader(kind: type[aggregator_pb2.UploadRequest | aggregator_pb2.DownloadResponse]) -> Callable[[bytes], Part]:
    """What reads messages of one kind; it raises DecodeError for bytes that are no such message."""

    def read(message: bytes) -> Part:
        return _chunk_in_place(message) or _part(kind.FromString(message))

    return read


def rounds_stub(channel: grpc.aio.Channel) -> RoundsStub:
    """The calls of a round, whose uploads take and whose downloads bring pieces."""
    stub = aggregator_pb2_grpc.RoundServiceStub(channel)
    calls: Any = stub
    calls.Upload = channel.stream_unary(
        f"/{ROUNDS}/Upload",
        request_serializer=serialize,
        response_deserializer=aggregator_pb2.UploadResponse.FromString,
    )
    calls.Download = channel.unary_stream(
        f"/{ROUNDS}/Download",
        request_serializer=aggregator_pb2.DownloadRequest.SerializeToString,
        response_deserializer=reader(aggregator_pb2.DownloadResponse),
    )
    return stub


def _part(message: aggregator_pb2.UploadRequest | aggregator_pb2.DownloadResponse) -> Part:
    part = message.WhichOneof("part")
    if part == "header":
        return message.header
    chunk = message.chunk
    return None if part is None else Piece(chunk.offset, chunk.data, chunk.crc32)


def _chunk_in_place(message: bytes) -> Piece | None:
    """The chunk if the message is laid out as serializers do it: offset (unless 0), data, CRC-32, nothing else."""
    head = _HEAD.match(message)
    if head is None:
        return None
    chunk_bytes, offset, data_bytes = head.groups()
    start, size = head.end(), len(message)
    end = start + _number(data_bytes)
    position = 0 if offset is None else _number(offset)
    if (
        head.end(1) + _number(chunk_bytes) != size
        or end + _CRC32_BYTES != size
        or message[end] != _CRC32
        or position >> _POSITION_BITS
    ):
        return None
    return Piece(position, memoryview(message)[start:end], int.from_bytes(message[end + 1 :], "little"))


@lru_cache(maxsize=4096)
def _number(varint: bytes) -> int:
    """What a varint stands for; the same lengths and positions come again and again."""
    value = 0
    for byte in reversed(varint):
        value = value << 7 | byte & 0x7F
    return value


def _to_varint(value: int) -> bytes:
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*groups, value))
