"""Places: where in a client's shared memory the tensors of one exchange lie.

Written down in front of an exchange's own meta section, so that the latter stays the same from
one exchange to the next. Knows offsets; knows no memory.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from symbiosis.errors import ProtocolError
from symbiosis.wire.tensors import ALIGNMENT, TensorSpec

INLINE = 0xFFFF_FFFF_FFFF_FFFF
"""In place of an offset: this tensor travels in the payload."""


class Room(NamedTuple):
    """Room for one result; ``size`` 0 for none."""

    start: int
    size: int


class Places(NamedTuple):
    """Offsets in bytes from the start of the shared memory."""

    inputs: tuple[int, ...]  # one per input tensor, or `INLINE`
    results: tuple[Room, ...]  # one per result; those beyond travel in the payload

    def inline(self, specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        """The inputs that travel in the payload."""
        return tuple(s for s, start in zip(specs, self.inputs, strict=True) if start == INLINE)

    def holds(self, result: int, num_bytes: int) -> bool:
        """Does the result of that number lie in its room? Both ends decide by this rule."""
        return result < len(self.results) and 0 < num_bytes <= self.results[result].size

    def check(self, specs: tuple[TensorSpec, ...], arena_bytes: int) -> None:
        """Raises ProtocolError unless all lies in the arena, aligned, and apart."""
        if len(self.inputs) != len(specs):
            raise ProtocolError(f"{len(self.inputs)} places for {len(specs)} input tensors")
        taken = [room for room in self.results if room.size]
        for spec, start in zip(specs, self.inputs, strict=True):
            if start == INLINE:
                continue
            if not spec.dtype.is_floating_point:
                raise ProtocolError(f"{spec} lies in the arena; integers travel in the payload")
            taken.append(Room(start, spec.num_bytes))
        end = 0
        for start, size in sorted(taken):
            if start % ALIGNMENT or start + size > arena_bytes:
                raise ProtocolError(
                    f"a place of {size} bytes at {start} is outside the arena of {arena_bytes} "
                    f"bytes, or not aligned to {ALIGNMENT}"
                )
            if start < end:
                raise ProtocolError(f"two places of an exchange overlap at {start}")
            end = start + size


def pack_places(places: Places) -> bytes:
    """``num_inputs u8 | num_results u8 | inputs u64 … | (start u64, size u64) …``."""
    numbers = [*places.inputs, *(number for room in places.results for number in room)]
    head = bytes((len(places.inputs), len(places.results)))
    return head + struct.pack(f"<{len(numbers)}Q", *numbers)


def unpack_places(meta: bytes) -> tuple[Places, int]:
    """Inverse of `pack_places`, and the offset behind it; raises ProtocolError if cut short."""
    try:
        num_inputs, num_results = meta[0], meta[1]
        numbers = struct.unpack_from(f"<{num_inputs + 2 * num_results}Q", meta, 2)
    except (IndexError, struct.error):
        raise ProtocolError("the places of an exchange are cut short") from None
    rooms = zip(numbers[num_inputs::2], numbers[num_inputs + 1 :: 2], strict=True)
    places = Places(numbers[:num_inputs], tuple(Room(*room) for room in rooms))
    return places, 2 + 8 * len(numbers)
