"""Checksums of frames that cross a network: xxh3, 64 bits, of header, meta section and payload.

Against damage, not against an enemy (that is TLS's business, which has a stronger one). The seed
of each is the one before, so that sections of different frames do not fit together.
"""

from __future__ import annotations

import struct

import xxhash

CHECKED = 0x80
"""In the kind byte: checksums follow the header, the meta section and the payload (if any)."""

CHECKSUM = struct.Struct("<Q")

_KIND_AT = 3
_HEADER_BYTES = 24


def checksum(data: memoryview | bytes, seed: int) -> int:
    """xxh3_64 of one section."""
    return xxhash.xxh3_64_intdigest(data, seed)


def checked(parts: list[bytes | memoryview]) -> list[bytes | memoryview]:
    """The buffers of a frame with its checksums. The first holds the header and the whole meta
    section, the others the payload; none is copied but the first."""
    header = bytearray(parts[0][:_HEADER_BYTES])
    header[_KIND_AT] |= CHECKED
    of_header = checksum(bytes(header), 0)
    meta = parts[0][_HEADER_BYTES:]
    of_meta = checksum(meta, of_header)
    head = b"".join((header, CHECKSUM.pack(of_header), meta, CHECKSUM.pack(of_meta)))
    payload = parts[1:]
    if not any(map(len, payload)):
        return [head]
    state = xxhash.xxh3_64(seed=of_meta)
    for part in payload:
        state.update(part)
    return [head, *payload, CHECKSUM.pack(state.intdigest())]
