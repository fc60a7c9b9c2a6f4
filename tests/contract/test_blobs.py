"""What every blob store must do."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common import staging as staging_area
from services.common.blobs import Blob, BlobStore, DirectoryBlobStore, check_key
from services.common.digests import digest_of
from services.common.disk import set_aside
from services.common.seals import PIECE_BYTES, Sealing, SealKey, measure
from shelora.errors import (
    ChecksumMismatch,
    InvalidIdentifier,
    OffsetMismatch,
    SizeMismatch,
    StorageFull,
    StoredBytesCorrupt,
    UnknownBlob,
)

Open = Callable[[], BlobStore]


@pytest.fixture(params=[DirectoryBlobStore])
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Opens the same store again, as a restarted process does."""
    return lambda: request.param(tmp_path / "state" / "blobs")


@pytest.fixture
def store(reopen: Open) -> BlobStore:
    return reopen()


def digest(data: bytes) -> bytes:
    return digest_of(data)


async def test_a_written_blob_is_named_by_size_and_digest(store: BlobStore, reopen: Open) -> None:
    blob = await store.write("round-1/factors/agent-1", [b"ab", b"", b"c"])
    assert blob == Blob("round-1/factors/agent-1", 3, digest(b"abc"))
    again = reopen()
    assert again.exists(blob.key)
    assert again.path(blob.key).read_bytes() == b"abc"
    await again.verify(blob)


async def test_an_empty_blob_is_a_blob(store: BlobStore) -> None:
    blob = await store.write("empty", [])
    assert blob == Blob("empty", 0, digest(b""))
    await store.verify(blob)


async def test_writing_again_replaces(store: BlobStore) -> None:
    await store.write("a", [b"old"])
    new = await store.write("a", [b"new!"])
    assert store.path("a").read_bytes() == b"new!"
    await store.verify(new)


async def test_a_failing_source_leaves_the_old_blob(store: BlobStore) -> None:
    old = await store.write("a", [b"old"])

    def broken() -> Iterator[bytes]:
        yield b"half of the new"
        raise ValueError("source broke")

    with pytest.raises(ValueError, match="source broke"):
        await store.write("a", broken())
    await store.verify(old)
    assert store.keys() == ["a"]


def test_a_writer_stores_only_what_is_committed(store: BlobStore) -> None:
    with store.writer("sum") as writer:
        writer.file.write(b"0123456789")
        writer.file.seek(2)
        writer.file.write(b"xx")
        assert not store.exists("sum")
        blob = writer.commit()
    assert blob == Blob("sum", 10, digest(b"01xx456789"))
    with store.writer("other") as writer:
        writer.file.write(b"never committed")
    with pytest.raises(RuntimeError, match="worker died"), store.writer("third") as writer:
        raise RuntimeError("worker died")
    assert store.keys() == ["sum"]


async def test_damage_and_absence_are_told_apart(store: BlobStore) -> None:
    blob = await store.write("a", [b"right"])
    for damage in (b"wrong", b"right and more", b""):
        store.path("a").write_bytes(damage)
        with pytest.raises(StoredBytesCorrupt) as caught:
            await store.verify(blob)
        assert caught.value.context == {"blob": "a"}
    store.delete("a")
    with pytest.raises(UnknownBlob):
        await store.verify(blob)


async def test_keys_and_deletion_by_prefix(store: BlobStore) -> None:
    for key in ("r/1/a", "r/1/b", "r/10/a", "r/2/a", "s"):
        await store.write(key, [b"x"])
    assert store.keys() == ["r/1/a", "r/1/b", "r/10/a", "r/2/a", "s"]
    assert store.keys("r/1/") == ["r/1/a", "r/1/b"]
    assert store.keys("r/1") == ["r/1/a", "r/1/b", "r/10/a"]
    assert store.keys("absent/folder/") == []
    assert store.delete_prefix("r/1/") == 2
    assert store.delete_prefix("r/1/") == 0
    store.delete("s")
    store.delete("s")
    assert store.keys() == ["r/10/a", "r/2/a"]
    await store.write("r/1", [b"the folder is free again"])


@pytest.mark.parametrize(
    "key", ["", "/a", "a/", "a//b", ".", "..", "a/../b", "a/./b", "A", "a b", "a\\b", "a\n", "é", "a" * 401]
)
def test_bad_keys_are_refused(store: BlobStore, key: str) -> None:
    for use in (store.path, store.exists, store.delete, store.staging):
        with pytest.raises(InvalidIdentifier):
            use(key)


@given(key=st.text(alphabet="ab./-_~\\\0A", max_size=12))
def test_accepted_keys_stay_inside(key: str) -> None:
    with contextlib.suppress(InvalidIdentifier):
        assert check_key(key) == key
        assert os.path.normpath(os.path.join("/base", key)) == f"/base/{key}"


async def test_a_staged_upload_continues_and_becomes_a_blob(store: BlobStore, reopen: Open) -> None:
    staging = store.staging("fed/3/agent-1")
    assert staging.size_bytes == 0
    staging.append(0, b"abc")
    again = reopen().staging("fed/3/agent-1")
    assert again.size_bytes == 3
    again.append(3, b"def")
    assert not store.exists("fed/blob")
    blob = await again.commit("fed/blob", 6, digest(b"abcdef"))
    assert blob == Blob("fed/blob", 6, digest(b"abcdef"))
    await store.verify(blob)
    assert staging.size_bytes == 0


async def test_what_another_process_staged_is_read_once(
    store: BlobStore, reopen: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.staging("a").append(0, b"abc")
    again = reopen().staging("a")
    read: list[Path] = []

    def measured(path: Path, key: SealKey) -> Sealing:
        read.append(path)
        return measure(path, key)

    monkeypatch.setattr(staging_area, "measure", measured)
    await again.verify(3, digest(b"abc"))
    again.sync()
    await again.commit("key", 3, digest(b"abc"))
    assert len(read) == 1


@pytest.mark.parametrize("offset", [0, 2, 4])
def test_another_offset_is_refused(store: BlobStore, offset: int) -> None:
    staging = store.staging("a")
    staging.append(0, b"abc")
    with pytest.raises(OffsetMismatch, match="expected the next byte at offset 3") as caught:
        staging.append(offset, b"x")
    assert caught.value.context == {"staged_bytes": "3"}
    assert staging.size_bytes == 3


@pytest.mark.parametrize(
    ("size", "content", "error"),
    [(4, b"abc", SizeMismatch), (2, b"abc", SizeMismatch), (3, b"abd", ChecksumMismatch), (1, None, SizeMismatch)],
)
async def test_a_mismatch_discards_the_staging(
    store: BlobStore, size: int, content: bytes | None, error: type[Exception]
) -> None:
    staging = store.staging("a")
    if content is not None:
        staging.append(0, b"abc")
    with pytest.raises(error):
        await staging.commit("key", size, digest(content or b""))
    assert staging.size_bytes == 0
    assert store.keys() == []
    staging.append(0, b"abc")
    await staging.commit("key", 3, digest(b"abc"))


async def test_an_empty_upload_can_be_committed(store: BlobStore) -> None:
    blob = await store.staging("a").commit("key", 0, digest(b""))
    await store.verify(blob)


def test_stagings_are_apart_and_discarded_by_prefix(store: BlobStore) -> None:
    for upload in ("r/1", "r/1/a", "r/2/a", "r-1"):
        store.staging(upload).append(0, upload.encode())
    assert store.staging("r/1").size_bytes == 3
    store.staging("r-1").discard()
    store.staging("r-1").discard()
    assert store.discard_stagings("r/1") == 2
    assert [store.staging(upload).size_bytes for upload in ("r/1", "r/1/a", "r/2/a", "r-1")] == [0, 0, 5, 0]


@given(pieces=st.lists(st.binary(min_size=1, max_size=50), min_size=1, max_size=8), cut=st.integers(0, 7))
def test_any_cut_upload_ends_as_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes], cut: int
) -> None:
    store = DirectoryBlobStore(tmp_path_factory.mktemp("blobs"))
    for piece in pieces[:cut]:
        store.staging("u").append(store.staging("u").size_bytes, piece)
    whole = b"".join(pieces)
    store.staging("u").append(store.staging("u").size_bytes, whole[store.staging("u").size_bytes :])
    assert store.staging("u").size_bytes == len(whole)


_STAGE_AND_DIE = """
import os, signal, sys
from pathlib import Path
from services.common.disk import set_aside
from services.common.blobs import DirectoryBlobStore
staging = DirectoryBlobStore(Path(sys.argv[1])).staging("up")
staging.append(0, b"a" * 100_000)
staging.append(100_000, b"b")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_staged_bytes_survive_a_killed_process(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _STAGE_AND_DIE, str(tmp_path)], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert DirectoryBlobStore(tmp_path).staging("up").size_bytes == 100_001


@pytest.fixture
def full_disk() -> Iterator[None]:
    """The kernel refuses to let any file grow beyond 10,000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("full_disk")
async def test_a_full_disk_leaves_everything_as_it_was(store: BlobStore) -> None:
    old = await store.write("a", [b"old"])
    with pytest.raises(StorageFull, match="blob a"):
        await store.write("a", [bytes(1_000)] * 20)
    await store.verify(old)
    staging = store.staging("u")
    staging.append(0, bytes(6_000))
    with pytest.raises(StorageFull):
        staging.append(6_000, bytes(6_000))
    assert staging.size_bytes == 6_000
    staging.append(6_000, bytes(4_000))
    await staging.commit("b", 10_000, digest(bytes(10_000)))
    assert store.keys() == ["a", "b"]


def test_space_for_the_whole_upload_is_set_aside_with_its_first_bytes(store: BlobStore, tmp_path: Path) -> None:
    with (tmp_path / "probe").open("wb") as probe:
        set_aside(probe.fileno(), 1 << 20)
        if not os.fstat(probe.fileno()).st_blocks:
            pytest.skip("this file system cannot set space aside")
    with pytest.raises(StorageFull):
        store.staging("huge", 1 << 60).append(0, b"abc")
    assert store.staging("huge").size_bytes == 0
    store.staging("u", 1 << 20).append(0, b"abc")
    store.staging("u", 1 << 20).append(3, b"d")
    staged = store.staging("u")
    assert staged.size_bytes == 4
    assert staged.path.stat().st_blocks * 512 >= 1 << 20
    staged.discard()


def test_leftovers_of_a_dead_writer_go(tmp_path: Path) -> None:
    store: Any = DirectoryBlobStore(tmp_path)
    leftover = tmp_path / "temporary" / "0123"
    leftover.write_bytes(b"half")
    store.staging("kept").append(0, b"x")
    store.discard_temporary()
    assert not leftover.exists()
    assert store.staging("kept").size_bytes == 1
    with store.writer("a") as writer:
        writer.commit()
    assert store.exists("a")


def tags_of(store: BlobStore, blob: Blob) -> bool:
    """Whether what is stored agrees with the seal."""
    seal, data = store.seal(blob), store.path(blob.key).read_bytes()
    return seal.holds([seal.tag(index, data[index * PIECE_BYTES :][:PIECE_BYTES]) for index in range(seal.pieces)])


@pytest.mark.parametrize("cut", [PIECE_BYTES, 1000])
async def test_a_seal_tells_whether_the_bytes_are_still_those_that_were_uploaded(
    store: BlobStore, reopen: Open, cut: int
) -> None:
    data = os.urandom(PIECE_BYTES + 1000)
    staging = store.staging("u")
    staging.append(0, data[:cut])
    staging.append(cut, data[cut:])
    blob = await staging.commit("key", len(data), digest(data))
    assert tags_of(store, blob)
    assert tags_of(reopen(), blob)
    store.path("key").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert not tags_of(store, blob)
    with pytest.raises(StoredBytesCorrupt):
        reopen().seal(blob)
    with pytest.raises(StoredBytesCorrupt):
        await store.verify(blob)
    store.delete("key")
    with pytest.raises(UnknownBlob):
        store.seal(blob)


async def test_a_blob_written_from_front_to_back_is_named_like_any_other(store: BlobStore) -> None:
    data = os.urandom(2 * PIECE_BYTES + 8)
    with store.writer("key") as writer:
        for start in range(0, len(data), PIECE_BYTES):
            writer.extend(memoryview(data)[start : start + PIECE_BYTES])
        blob = writer.commit()
    assert blob == Blob("key", len(data), digest(data))
    assert tags_of(store, blob)
    with store.writer("mixed") as writer:
        writer.extend(data)
        writer.file.seek(0)
        writer.file.write(b"other")
        writer.file.seek(0, os.SEEK_END)
        writer.file.write(b"more")
        assert writer.commit().digest == digest(b"other" + data[5:] + b"more")


async def test_a_part_of_an_upload_that_another_process_took_in_is_hashed_in_the_end(
    store: BlobStore, reopen: Open
) -> None:
    store.staging("u").append(0, b"abc")
    later = reopen()
    later.staging("u").append(3, b"def")
    blob = await later.staging("u").commit("key", 6, digest(b"abcdef"))
    assert tags_of(later, blob)
