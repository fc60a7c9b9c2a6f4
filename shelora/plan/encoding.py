"""One unambiguous byte encoding for everything that is hashed: digests, key-derivation labels.

Every item is tagged with its kind and its length, so that no two different sequences have the same bytes.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable
from typing import Final

DIGEST_BYTES: Final = 32
"""Length of every digest in this package (SHA-256)."""

_LENGTH_BYTES: Final = 8


def encode_items(items: Iterable[str | int | bytes]) -> bytes:
    """Encode a sequence of texts, integers and byte strings so that the sequence can be read back in one way only.

    Callers that flatten nested sequences put the length of each inner sequence before its items.

    Args:
        items: str (as UTF-8), int of any size and sign (as decimal digits; bool counts as 0 and 1), or bytes.

    Returns:
        For each item one tag byte, its length as 8 bytes big-endian, and its bytes.

    Raises:
        TypeError: an item is of another type.
    """
    encoded = bytearray()
    for item in items:
        if isinstance(item, str):
            tag, body = b"s", item.encode("utf-8")
        elif isinstance(item, bytes):
            tag, body = b"b", item
        else:
            tag, body = b"i", str(operator.index(item)).encode("ascii")
        encoded += tag + len(body).to_bytes(_LENGTH_BYTES, "big") + body
    return bytes(encoded)


def digest_items(label: str, items: Iterable[str | int | bytes]) -> bytes:
    """SHA-256 over the encoding of `label` followed by `items`.

    Args:
        label: what is hashed; different kinds of things never share a digest.
        items: as for `encode_items`.

    Returns:
        bytes[32].
    """
    return hashlib.sha256(encode_items((label, *items))).digest()
