"""Masks: uniform residues from a cryptographic stream, each used once.

A mask is named by a key and a number. The key is drawn from the operating system, once per
stream and again in every forked child; the numbers of a stream never repeat. So no two masks are
ever the same, whatever fails in between: a mask that was taken is gone. A helper that is told key
and number expands the same mask. Knows keys and integers; knows nothing of weights.

AES-256 in counter mode of the `cryptography` library: uniform bytes are uniform residues, for both
rings are powers of two, so nothing is rejected and nothing is biased.
"""

from __future__ import annotations

import itertools
import os
import struct
from typing import NamedTuple

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from symbiosis.privacy.ring import RESIDUE_BYTES, WORDS, from_wire

KEY_BYTES = 32
_ZEROS = memoryview(bytes(1 << 20))
_BLOCK_BYTES = 16  # of AES

_generation = 0


def generation() -> int:
    """How many forks lie between this process and the one that imported this module."""
    return _generation


def _forked() -> None:
    global _generation
    _generation += 1


os.register_at_fork(after_in_child=_forked)


class MaskName(NamedTuple):
    """Which mask."""

    key: bytes  # 32 bytes, secret
    number: int  # u64, never twice with one key


class MaskStream:
    """Names of fresh masks. Safe from any thread and across forks."""

    def __init__(self) -> None:
        self._state = _generation, os.urandom(KEY_BYTES), itertools.count()

    def next(self) -> MaskName:
        """A name that nobody has had before."""
        generation, key, numbers = self._state
        if generation != _generation:  # a child must not repeat what its parent goes on with
            self._state = _generation, os.urandom(KEY_BYTES), itertools.count()
            _, key, numbers = self._state
        return MaskName(key, next(numbers))

    def __reduce__(self) -> tuple[type[MaskStream], tuple[()]]:
        """A copy in another process is a stream of its own."""
        return MaskStream, ()


def expand(name: MaskName, rows: int, width: int, bits: int, start: int = 0) -> Tensor:
    """The mask's ``rows`` from ``start`` on (rows, width): residues in memory as
    `symbiosis.privacy.ring` has them.

    The bytes of the stream, row by row: four for a residue modulo 2^32, six modulo 2^48.
    """
    shape, dtype = (
        ((rows, width), torch.int32) if bits == 8 else ((rows, width, WORDS), torch.int16)
    )
    words = torch.empty(shape, dtype=dtype)
    block, skipped = divmod(start * width * RESIDUE_BYTES[bits], _BLOCK_BYTES)
    num_bytes = skipped + words.nbytes
    # The cipher wants room for a block more than it writes.
    stream = torch.empty(num_bytes + _BLOCK_BYTES, dtype=torch.uint8)
    counter = struct.pack(">QQ", name.number, block)  # 2^64 blocks for each mask
    cipher = Cipher(algorithms.AES(name.key), modes.CTR(counter)).encryptor()
    room, at = stream.numpy().data, 0
    while at < num_bytes:
        size = min(len(_ZEROS), num_bytes - at)
        at += cipher.update_into(_ZEROS[:size], room[at:])
    if words.nbytes:
        words.view(torch.uint8).flatten().copy_(stream[skipped:num_bytes])
    return from_wire(words)
