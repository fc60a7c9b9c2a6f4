"""Payloads as checked pieces, and verified downloads that continue where they were cut."""

from __future__ import annotations

import os
from collections.abc import AsyncIterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from zlib_ng import zlib_ng

from services.common.digests import DIGEST_BYTES, Buffer, digest_of, digest_of_file
from services.common.files import full_disk_refused, make_folders, sync_folder
from services.common.threads import in_thread
from shelora.errors import ChecksumMismatch, MalformedPayload, OffsetMismatch, PayloadTooLarge, SizeMismatch
from shelora.v1 import types_pb2

CHUNK_BYTES: Final = 1 << 20
"""Bytes of one chunk as sent, except for the last."""

MAX_CHUNK_BYTES: Final = 4 << 20
"""Longest chunk that is accepted."""

STAGED_BYTES: Final = "staged-bytes"
"""Key of the initial metadata with which an aggregator asks for the chunks of an upload: where they shall begin."""

MAX_PAYLOAD_BYTES: Final = 1 << 40
"""Longest payload that can be announced."""


class Piece(NamedTuple):
    """Some bytes of a streamed payload, their position in it, and the CRC-32 they came or go with.

    The checksum of a received piece is not checked yet: that takes as long as writing the bytes and is done in the same
    thread.
    """

    offset: int
    data: Buffer
    crc32: int


def pieces(source: Path | bytes, offset: int = 0) -> Iterator[Piece]:
    """Cut a payload into pieces of CHUNK_BYTES.

    Args:
        source: the payload, or the file that holds it.
        offset: first byte to send.

    Yields:
        Pieces with offset and CRC-32; none when the offset is the end.

    Raises:
        OffsetMismatch: the offset is negative or beyond the end.
    """
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    if not 0 <= offset <= size:
        raise OffsetMismatch(
            f"payload: expected an offset of 0 to {size}, got {offset}", hint="start again at offset 0"
        )
    if isinstance(source, bytes):
        for position in range(offset, size, CHUNK_BYTES):
            yield _piece(position, source[position : position + CHUNK_BYTES])
        return
    with source.open("rb") as file:
        file.seek(offset)
        position = offset
        while data := file.read(CHUNK_BYTES):
            yield _piece(position, data)
            position += len(data)


def _piece(offset: int, data: bytes) -> Piece:
    return Piece(offset, data, zlib_ng.crc32(data))


def check_piece(piece: Piece, expected_offset: int) -> Buffer:
    """Check one received piece.

    Args:
        piece: as received.
        expected_offset: bytes of the payload already held.

    Returns:
        Its data.

    Raises:
        MalformedPayload: no data.
        PayloadTooLarge: more than MAX_CHUNK_BYTES.
        OffsetMismatch: it does not continue at the expected offset.
        ChecksumMismatch: the data do not match the CRC-32.
    """
    check_order(piece.offset, piece.data, expected_offset)
    check_crc(piece.offset, piece.data, piece.crc32)
    return piece.data


def check_order(offset: int, data: Buffer, expected_offset: int) -> None:
    """Check everything about a received chunk but its CRC-32.

    Args:
        offset: position in the payload, as received.
        data: as received.
        expected_offset: bytes of the payload already held.

    Raises:
        MalformedPayload, PayloadTooLarge, OffsetMismatch: see `check_piece`.
    """
    if not data:
        raise MalformedPayload(f"chunk at offset {offset}: expected 1 to {MAX_CHUNK_BYTES} bytes, got none")
    if len(data) > MAX_CHUNK_BYTES:
        raise PayloadTooLarge(f"chunk: expected at most {MAX_CHUNK_BYTES} bytes, got {len(data)}")
    if offset != expected_offset:
        raise OffsetMismatch(
            f"chunk: expected offset {expected_offset}, got {offset}",
            hint="ask how many bytes are held and continue there",
            context={"staged_bytes": str(expected_offset)},
        )


def check_crc(offset: int, data: Buffer, crc32: int) -> None:
    """Check the data of one chunk.

    Args:
        offset: position in the payload, for the message.
        data: as received.
        crc32: as announced.

    Raises:
        ChecksumMismatch: the data do not match the CRC-32.
    """
    computed = zlib_ng.crc32(data)
    if computed != crc32:
        raise ChecksumMismatch(
            f"chunk at offset {offset}: expected CRC-32 {crc32:08x}, got {computed:08x}",
            hint="send the chunk again",
        )


def payload_header(source: Path | bytes, digest: bytes = b"") -> types_pb2.PayloadHeader:
    """Length and digest of a payload or of the file that holds it; reads the whole of it unless the digest is known."""
    if isinstance(source, bytes):
        return types_pb2.PayloadHeader(size_bytes=len(source), digest=digest or digest_of(source))
    return types_pb2.PayloadHeader(size_bytes=source.stat().st_size, digest=digest or digest_of_file(source))


def check_header(header: types_pb2.PayloadHeader, limit_bytes: int = MAX_PAYLOAD_BYTES) -> None:
    """Check a received payload header.

    Raises:
        PayloadTooLarge: announces more than limit_bytes.
        MalformedPayload: the digest is not 32 bytes.
    """
    if header.size_bytes > limit_bytes:
        raise PayloadTooLarge(f"payload: expected at most {limit_bytes} bytes, got {header.size_bytes}")
    if len(header.digest) != DIGEST_BYTES:
        raise MalformedPayload(f"payload digest: expected {DIGEST_BYTES} bytes, got {len(header.digest)}")


def _part(sink: Path, header: types_pb2.PayloadHeader) -> Path:
    return sink.with_name(f".{sink.name}.{header.digest.hex()[:16]}.part")


def received_bytes(sink: Path) -> int:
    """How many bytes of a cut download to `sink` are held: the offset to ask for next."""
    parts = list(sink.parent.glob(f".{sink.name}.*.part"))
    return parts[0].stat().st_size if len(parts) == 1 else 0


async def receive(stream: AsyncIterable[Piece], sink: Path, header: types_pb2.PayloadHeader, offset: int = 0) -> int:
    """Write a download to a file that appears only when it is complete and verified.

    Cut downloads leave a partial file beside the sink; ask `received_bytes` for the offset to continue at. When the
    other side offers another payload by then, OffsetMismatch (retryable) says so and the partial file is removed, so
    the next try starts at 0.

    Args:
        stream: the pieces from the asked offset on.
        sink: where the file shall appear; an old one is replaced.
        header: length and digest of the whole payload.
        offset: the offset that was asked for.

    Returns:
        Length of the payload in bytes.

    Raises:
        OffsetMismatch: the held bytes are not the beginning of this payload, or a piece is out of order.
        PayloadTooLarge: more bytes than announced.
        SizeMismatch: the stream ended early; the partial file stays.
        ChecksumMismatch: a piece or the whole payload fails its checksum.
        StorageFull: the disk takes no more.
    """
    check_header(header)
    part = _part(sink, header)
    held = await in_thread(_prepare, part, sink, offset)
    if held != offset:
        raise OffsetMismatch(
            f"download: expected to continue at offset {held}, got {offset}", hint=f"ask again from offset {held}"
        )
    async for piece in stream:
        data = check_piece(piece, held)
        if held + len(data) > header.size_bytes:
            raise PayloadTooLarge(f"download: expected {header.size_bytes} bytes, got at least {held + len(data)}")
        await in_thread(_append, part, data)
        held += len(data)
    if held != header.size_bytes:
        raise SizeMismatch(
            f"download: expected {header.size_bytes} bytes, got {held}", hint=f"ask again from offset {held}"
        )
    await in_thread(_finish, part, sink, header)
    return held


def _prepare(part: Path, sink: Path, offset: int) -> int:
    """Remove partial files of other payloads, start afresh at offset 0; answers how many bytes are held."""
    make_folders(sink.parent)
    for other in sink.parent.glob(f".{sink.name}.*.part"):
        if other != part or offset == 0:
            other.unlink(missing_ok=True)
    with full_disk_refused("download"):
        part.touch(mode=0o600)
    return part.stat().st_size


def _append(part: Path, data: Buffer) -> None:
    with full_disk_refused("download"), part.open("ab", buffering=0) as file:
        start = file.tell()
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) or 0 :]
        except OSError:
            file.truncate(start)
            raise


def _finish(part: Path, sink: Path, header: types_pb2.PayloadHeader) -> None:
    """Verify the whole file and move it to its place, durably."""
    if payload_header(part).digest != header.digest:
        part.unlink()
        raise ChecksumMismatch(
            "download: expected the announced digest, got other bytes", hint="download again from offset 0"
        )
    with full_disk_refused("download"):
        descriptor = os.open(part, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(part, sink)
        sync_folder(sink.parent)
