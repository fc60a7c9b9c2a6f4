"""Messages that bring chunks, written and read in place, say what protobuf says they say."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from services.common.chunk_codec import reader, serialize
from services.common.transfer import Piece
from shelora.v1 import aggregator_pb2, types_pb2

chunks = st.builds(
    types_pb2.Chunk,
    offset=st.one_of(st.just(0), st.integers(0, 2**64 - 1)),
    data=st.binary(max_size=300),
    crc32=st.integers(0, 2**32 - 1),
)


KINDS = (aggregator_pb2.UploadRequest, aggregator_pb2.DownloadResponse)
read_part = reader(aggregator_pb2.UploadRequest)


def by_protobuf(message):
    """The same answer by protobuf alone."""
    request = aggregator_pb2.UploadRequest.FromString(message)
    part = request.WhichOneof("part")
    if part == "header":
        return request.header
    return Piece(request.chunk.offset, request.chunk.data, request.chunk.crc32) if part else None


@pytest.mark.parametrize("kind", KINDS)
@given(chunks)
def test_a_chunk_is_read_as_it_was_written(kind, chunk):
    message = kind(chunk=chunk).SerializeToString()
    assert reader(kind)(message) == Piece(chunk.offset, chunk.data, chunk.crc32)


@pytest.mark.parametrize("kind", KINDS)
@given(chunks)
@example(types_pb2.Chunk(offset=2**64 - 1, data=b"x" * (1 << 21), crc32=2**32 - 1))
def test_protobuf_reads_what_is_written(kind, chunk):
    message = serialize(Piece(chunk.offset, memoryview(chunk.data), chunk.crc32))
    assert kind.FromString(message) == kind(chunk=chunk)
    assert reader(kind)(message) == Piece(chunk.offset, chunk.data, chunk.crc32)


@pytest.mark.parametrize("kind", KINDS)
def test_headers_are_left_to_protobuf(kind):
    message = kind()
    message.header.plan_version = 3
    assert reader(kind)(serialize(message)) == message.header


def test_the_bytes_of_a_chunk_are_not_copied():
    chunk = types_pb2.Chunk(offset=1 << 30, data=b"x" * 1000, crc32=7)
    message = aggregator_pb2.UploadRequest(chunk=chunk).SerializeToString()
    piece = read_part(message)
    assert isinstance(piece, Piece)
    assert isinstance(piece.data, memoryview)
    assert piece.data.obj is message


def test_other_parts_are_left_to_protobuf():
    header = aggregator_pb2.UploadHeader(federation="f", round=3)
    assert read_part(aggregator_pb2.UploadRequest(header=header).SerializeToString()) == header
    assert read_part(b"") is None


@pytest.mark.parametrize(
    "message",
    [
        b"\x12\x0a\x12\x03abc\x1d\x01\x00\x00\x00",  # without an offset
        b"\x12\x0c\x08\x00\x12\x03abc\x1d\x01\x00\x00\x00",  # with an offset of 0
        b"\x12\x0c\x12\x03abc\x1d\x01\x00\x00\x00\x08\x05",  # offset last
        b"\x12\x0f\x12\x03xyz\x12\x03abc\x1d\x01\x00\x00\x00",  # data twice
        b"\x12\x0d\x12\x03abc\x1d\x01\x00\x00\x00\x22\x01z",  # a field of a newer release
        b"\x12\x0a\x12\x03abc\x1d\x01\x00\x00\x00\x12\x0a\x12\x03xyz\x1d\x02\x00\x00\x00",  # two chunks
        b"\x12\x0a\x12\x03abc\x1d\x01\x00\x00\x00\x0a\x03\x0a\x01f",  # a chunk, then a header
        b"\x12\x8c\x00\x12\x83\x80\x00abc\x1d\x01\x00\x00\x00",  # numbers longer than need be
        b"\x12\x05\x12\x03abc",  # without a checksum
        b"\x12\x00",  # an empty chunk
    ],
)
def test_unusual_layouts_mean_what_protobuf_says(message):
    assert read_part(message) == by_protobuf(message)


@given(st.binary(max_size=40), chunks, st.data())
@example(b"\x12\x0b\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f", types_pb2.Chunk(), None)
def test_hostile_bytes_mean_what_protobuf_says(noise, chunk, data):
    """Noise alone, and noise put into a good message."""
    good = aggregator_pb2.UploadRequest(chunk=chunk).SerializeToString()
    at = 0 if data is None else data.draw(st.integers(0, min(20, len(good))))
    for message in (noise, good[:at] + noise + good[at:], good[:at] + noise):
        try:
            expected = by_protobuf(message)
        except DecodeError:
            with pytest.raises(DecodeError):
                read_part(message)
        else:
            assert read_part(message) == expected
