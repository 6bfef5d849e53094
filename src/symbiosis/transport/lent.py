"""Weights in memory that an executor lends to clients on its host.

The executor fills it once and seals it: whoever gets the descriptor maps the same pages, can
neither write nor shrink them, and has no copy of its own. Knows memory and tensors; knows nothing
of models.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import sys
import weakref

import torch

from symbiosis.errors import ProtocolError
from symbiosis.transport.arena import MAP_NORESERVE, ArenaUnfit, checked_size
from symbiosis.wire.frames import Json
from symbiosis.wire.tensors import ALIGNMENT

_COUNT = struct.Struct("<I")
_SEAL_FUTURE_WRITE = 0x10
"""Linux 5.1: no further mapping may write, those that exist may. Not in `fcntl` before 3.13."""


class Lender:
    """The executor's side: memory that grows weight by weight, up to ``most_bytes``.

    Fill it in one thread, then `seal` it. Survives a fork: the child lends the same memory.
    """

    def __init__(self, most_bytes: int) -> None:
        """Address space for ``most_bytes``; memory is taken as it is filled. Raises OSError where
        the system has no such memory."""
        flags = os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC
        self.descriptor = os.memfd_create("symbiosis-weights", flags)
        weakref.finalize(self, os.close, self.descriptor)  # who has it mapped keeps the memory
        self.num_bytes = -(-most_bytes // mmap.PAGESIZE) * mmap.PAGESIZE + mmap.PAGESIZE
        os.ftruncate(self.descriptor, self.num_bytes)
        self._map = mmap.mmap(self.descriptor, self.num_bytes)
        self._end = mmap.PAGESIZE  # before it: what is announced
        self._at: dict[int, tuple[int, torch.dtype]] = {}

    def announce(self, clients: int) -> None:
        """Tell those who borrow how many clients are at work."""
        _COUNT.pack_into(self._map, 0, clients)

    def place(self, weight: int, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy of ``tensor`` in the memory, as the weight of that id."""
        start = -(-self._end // ALIGNMENT) * ALIGNMENT
        placed = _tensor_at(self._map, start, tensor.dtype, tuple(tensor.shape))
        placed.copy_(tensor)
        self._end = start + tensor.nbytes
        self._at[weight] = start, tensor.dtype
        return placed

    def table(self) -> Json:
        """Where each weight begins and its dtype, by id, as WELCOME says."""
        return {
            str(weight): [start, str(dtype).removeprefix("torch.")]
            for weight, (start, dtype) in self._at.items()
        }

    def seal(self) -> None:
        """From now on nobody can change it: neither its size, nor, through the descriptor, what
        is in it. Raises OSError before Linux 5.1."""
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _SEAL_FUTURE_WRITE
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, seals | fcntl.F_SEAL_SEAL)


class Lent:
    """The client's side: an executor's weights, mapped. Tensors keep the mapping alive."""

    def __init__(self, descriptor: int, table: object) -> None:
        """Takes ``descriptor`` over. ``table``: see `Lender.table`. Raises ProtocolError, OSError
        if there is no address space for it."""
        try:
            self._at = _checked_table(table)
            # Private: whoever writes by mistake writes into a copy of the page.
            self._map = mmap.mmap(
                descriptor,
                checked_size(descriptor, sys.maxsize),
                mmap.MAP_PRIVATE | MAP_NORESERVE,
                mmap.PROT_READ | mmap.PROT_WRITE,
            )
        except ArenaUnfit as error:
            raise ProtocolError(
                f"the executor lends memory that cannot be mapped: {error}"
            ) from None
        finally:
            os.close(descriptor)

    def __contains__(self, weight: int) -> bool:
        return weight in self._at

    @property
    def clients(self) -> int:
        """How many clients are at work, by what the executor last announced."""
        found: int = _COUNT.unpack_from(self._map)[0]
        return found

    def tensor(self, weight: int, shape: tuple[int, ...]) -> torch.Tensor:
        """The weight of that id; not to be changed. Raises ProtocolError."""
        start, dtype = self._at[weight]
        try:
            return _tensor_at(self._map, start, dtype, shape)
        except ValueError:
            raise ProtocolError(
                f"the executor lends weight {weight} of the shape {list(shape)} at {start}, which "
                f"is not within the {len(self._map)} bytes that it lends"
            ) from None


def _checked_table(table: object) -> dict[int, tuple[int, torch.dtype]]:
    found = {}
    try:
        for number, (start, dtype) in table.items():  # type: ignore[attr-defined]
            found[int(number)] = (int(start), getattr(torch, str(dtype)))
            if start % ALIGNMENT or not isinstance(found[int(number)][1], torch.dtype):
                raise ValueError(f"weight {number} at {start}, {dtype}")
    except (AttributeError, TypeError, ValueError) as error:
        raise ProtocolError(
            f"the executor's table of lent weights makes no sense: {error}"
        ) from None
    return found


def _tensor_at(
    memory: mmap.mmap, start: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> torch.Tensor:
    """Raises ValueError if it is not within the memory."""
    count = torch.Size(shape).numel()
    if start < 0 or start + count * dtype.itemsize > len(memory):
        raise ValueError("beyond the end")
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=start).view(shape)
