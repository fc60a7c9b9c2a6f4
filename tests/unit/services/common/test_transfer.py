from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common import transfer
from services.common.digests import digest_of
from services.common.transfer import (
    CHUNK_BYTES,
    MAX_CHUNK_BYTES,
    Piece,
    check_header,
    check_piece,
    payload_header,
    pieces,
    receive,
    received_bytes,
)
from shelora.errors import (
    ChecksumMismatch,
    MalformedPayload,
    OffsetMismatch,
    PayloadTooLarge,
    SheLoraError,
    SizeMismatch,
)
from shelora.v1 import types_pb2

PAYLOAD = bytes(range(256)) * 10_000  # between two and three chunks


@pytest.fixture(params=["bytes", "file"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "bytes":
        return PAYLOAD
    path = tmp_path / "payload"
    path.write_bytes(PAYLOAD)
    return path


@pytest.mark.parametrize("offset", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 5, len(PAYLOAD) - 1, len(PAYLOAD)])
def test_pieces_carry_the_payload_from_any_offset(source: Any, offset: int) -> None:
    position = offset
    collected = []
    for piece in pieces(source, offset):
        data = check_piece(piece, position)
        assert len(data) <= CHUNK_BYTES
        collected.append(data)
        position += len(data)
    assert b"".join(collected) == PAYLOAD[offset:]


def test_the_header_names_size_and_digest(source: Any) -> None:
    header = payload_header(source)
    assert (header.size_bytes, header.digest) == (len(PAYLOAD), digest_of(PAYLOAD))
    check_header(header, len(PAYLOAD))
    with pytest.raises(PayloadTooLarge):
        check_header(header, len(PAYLOAD) - 1)
    with pytest.raises(MalformedPayload, match="expected 32 bytes, got 31"):
        check_header(types_pb2.PayloadHeader(size_bytes=1, digest=bytes(31)))


@pytest.mark.parametrize("offset", [-1, len(PAYLOAD) + 1])
def test_offsets_outside_the_payload_are_refused(source: Any, offset: int) -> None:
    with pytest.raises(OffsetMismatch):
        list(pieces(source, offset))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"data": b""}, MalformedPayload),
        ({"data": bytes(MAX_CHUNK_BYTES + 1)}, PayloadTooLarge),
        ({"offset": 6}, OffsetMismatch),
        ({"offset": 4}, OffsetMismatch),
        ({"crc32": 1}, ChecksumMismatch),
        ({"data": b"abd"}, ChecksumMismatch),
    ],
)
def test_wrong_pieces_are_refused(changes: dict[str, Any], error: type[SheLoraError]) -> None:
    fields: dict[str, Any] = {"offset": 5, "data": b"abc", "crc32": 0x352441C2} | changes
    check_piece(Piece(5, b"abc", 0x352441C2), 5)
    with pytest.raises(error, match="expected"):
        check_piece(Piece(**fields), 5)


async def feed(parts: Iterable[Piece], cut: int | None = None) -> AsyncIterator[Piece]:
    for number, piece in enumerate(parts):
        if number == cut:
            raise ConnectionError("cut")
        yield piece


async def test_a_download_appears_when_it_is_complete(tmp_path: Path) -> None:
    sink = tmp_path / "new" / "average.download"
    header = payload_header(PAYLOAD)
    assert await receive(feed(pieces(PAYLOAD)), sink, header) == len(PAYLOAD)
    assert sink.read_bytes() == PAYLOAD
    assert [entry.name for entry in sink.parent.iterdir()] == ["average.download"]
    assert received_bytes(sink) == 0
    small = payload_header(b"small")
    await receive(feed(pieces(b"small")), sink, small)
    assert sink.read_bytes() == b"small"
    await receive(feed([]), sink, payload_header(b""))
    assert sink.read_bytes() == b""


async def test_a_cut_download_continues(tmp_path: Path) -> None:
    sink = tmp_path / "file"
    header = payload_header(PAYLOAD)
    for cut in (1, 1):
        offset = received_bytes(sink)
        with pytest.raises(ConnectionError, match="cut"):
            await receive(feed(pieces(PAYLOAD, offset), cut), sink, header, offset)
        assert not sink.exists()
    offset = received_bytes(sink)
    assert offset == 2 * CHUNK_BYTES
    await receive(feed(pieces(PAYLOAD, offset)), sink, header, offset)
    assert sink.read_bytes() == PAYLOAD


async def test_another_payload_starts_afresh(tmp_path: Path) -> None:
    sink = tmp_path / "file"
    with pytest.raises(SizeMismatch):
        await receive(feed(pieces(PAYLOAD[:1000])), sink, payload_header(PAYLOAD))
    assert received_bytes(sink) == 1000
    other = bytes(5000)
    with pytest.raises(OffsetMismatch, match="expected to continue at offset 0, got 1000") as caught:
        await receive(feed(pieces(other, 1000)), sink, payload_header(other), 1000)
    assert caught.value.retryable
    offset = received_bytes(sink)
    assert offset == 0
    await receive(feed(pieces(other, offset)), sink, payload_header(other), offset)
    assert sink.read_bytes() == other


async def test_wrong_bytes_never_appear(tmp_path: Path) -> None:
    sink = tmp_path / "file"
    header = payload_header(b"right")
    with pytest.raises(ChecksumMismatch, match="announced digest"):
        await receive(feed(pieces(b"wrong")), sink, header)
    with pytest.raises(PayloadTooLarge):
        await receive(feed(pieces(b"right and more")), sink, header)
    with pytest.raises(OffsetMismatch):
        await receive(feed(pieces(b"right", 2)), sink, header)
    assert not sink.exists()
    await receive(feed(pieces(b"right")), sink, header)
    assert sink.read_bytes() == b"right"


@given(payload=st.binary(max_size=60), size=st.integers(1, 20), offset=st.integers(0, 70))
def test_any_payload_survives_any_chunk_size(payload: bytes, size: int, offset: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "CHUNK_BYTES", size)
        if offset > len(payload):
            with pytest.raises(OffsetMismatch):
                list(pieces(payload, offset))
            return
        parts = list(pieces(payload, offset))
    assert b"".join(piece.data for piece in parts) == payload[offset:]
    assert [piece.offset for piece in parts] == list(range(offset, len(payload), size))
