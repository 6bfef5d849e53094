"""Weights in memory that an executor lends to clients on its host.

The executor fills it once and seals it: whoever gets the descriptor maps the same pages, can
neither write nor shrink them, and has no copy of its own. Weights on a GPU lie in a block of its
memory instead, which cannot be sealed (`device_memory`). Knows memory and tensors; knows nothing of
models.
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
from symbiosis.transport import device_memory
from symbiosis.transport.arena import MAP_NORESERVE, ArenaUnfit, checked_size
from symbiosis.wire.frames import Json
from symbiosis.wire.tensors import ALIGNMENT

_COUNT = struct.Struct("<I")
_SEAL_FUTURE_WRITE = 0x10
"""Linux 5.1: no further mapping may write, those that exist may. Not in `fcntl` before 3.13."""


class Lender:
    """The executor's side: memory that is filled weight by weight, up to ``most_bytes``.

    Fill it in one thread, then `seal` it. Survives a fork: the child lends the same memory, unless
    that is a GPU's.
    """

    def __init__(self, most_bytes: int, block: torch.Tensor | None = None) -> None:
        """Address space for ``most_bytes``; memory is taken as it is filled. Or ``block``, of that
        size: memory of a device, by `device_memory.allocate`. Raises OSError where the system has
        no such memory."""
        flags = os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC
        self.descriptor = os.memfd_create("symbiosis-weights", flags)
        weakref.finalize(self, os.close, self.descriptor)  # who has it mapped keeps the memory
        here_bytes = most_bytes if block is None else 0
        self.num_bytes = -(-here_bytes // mmap.PAGESIZE) * mmap.PAGESIZE + mmap.PAGESIZE
        os.ftruncate(self.descriptor, self.num_bytes)
        self._map = mmap.mmap(self.descriptor, self.num_bytes)
        self._block = block
        self._shared: Json | None = None
        self._end = mmap.PAGESIZE if block is None else 0  # the first page: what is announced
        self._at: dict[int, tuple[int, torch.dtype]] = {}

    @property
    def is_sealed(self) -> bool:
        """Or can whoever borrows write to it, too?"""
        return self._block is None

    def announce(self, clients: int) -> None:
        """Tell those who borrow how many clients are at work."""
        _COUNT.pack_into(self._map, 0, clients)

    def place(self, weight: int, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy of ``tensor``, of whatever device, in the memory, as the weight of that
        id."""
        memory: mmap.mmap | torch.Tensor = self._map
        alignment = ALIGNMENT
        if self._block is not None:
            memory, alignment = self._block, device_memory.ALIGNMENT
        start = -(-self._end // alignment) * alignment
        placed = _tensor_at(memory, start, tensor.dtype, tuple(tensor.shape))
        placed.copy_(tensor)
        self._end = start + tensor.nbytes
        self._at[weight] = start, tensor.dtype
        return placed

    def table(self) -> Json:
        """Where each weight begins and its dtype, by id, and the device's memory that this is in,
        as WELCOME says. Of sealed memory only."""
        weights = {
            str(weight): [start, str(dtype).removeprefix("torch.")]
            for weight, (start, dtype) in self._at.items()
        }
        return {"weights": weights, "device": self._shared}

    def seal(self) -> None:
        """It is filled. From now on nobody can change it: neither its size, nor, through the
        descriptor, what is in it. (Memory of a device is only shared.) Raises OSError before Linux
        5.1, RuntimeError where the device cannot share."""
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _SEAL_FUTURE_WRITE
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, seals | fcntl.F_SEAL_SEAL)
        if self._block is not None:
            self._shared = device_memory.share(self._block)


class Lent:
    """The client's side: an executor's weights. Tensors keep what is mapped or attached alive."""

    def __init__(self, descriptor: int, table: object) -> None:
        """Takes ``descriptor`` over. ``table``: see `Lender.table`. Memory of a device is attached
        when the first weight is asked for. Raises ProtocolError, OSError if there is no address
        space for it."""
        self._block: torch.Tensor | None = None
        try:
            self._at, self._shared = _checked_table(table)
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
    def is_in_host_memory(self) -> bool:
        return self._shared is None

    def is_same_memory(self, other: Lent) -> bool:
        """Memory of a device that the same executor lent twice?"""
        return self._shared is not None and self._shared == other._shared

    def is_on(self, device: torch.device) -> bool:
        """Do the weights lie where a client on that device can compute with them?"""
        if self._shared is None:
            return device.type == "cpu"
        return device_memory.is_on(self._shared, device)

    @property
    def clients(self) -> int:
        """How many clients are at work, by what the executor last announced."""
        found: int = _COUNT.unpack_from(self._map)[0]
        return found

    def tensor(self, weight: int, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """The weight of that id on the ``device`` that it `is_on`; not to be changed. Raises
        ProtocolError, RuntimeError if the device's memory cannot be attached."""
        start, dtype = self._at[weight]
        memory: mmap.mmap | torch.Tensor = self._map
        if self._shared is not None:
            if self._block is None:
                self._block = device_memory.attach(self._shared, device)
            memory = self._block
        try:
            return _tensor_at(memory, start, dtype, shape)
        except ValueError:
            raise ProtocolError(
                f"the executor lends weight {weight} of the shape {list(shape)} at {start}, which "
                f"is not within the {len(memory)} bytes that it lends"
            ) from None


def _checked_table(table: object) -> tuple[dict[int, tuple[int, torch.dtype]], Json | None]:
    found = {}
    try:
        shared = table["device"]  # type: ignore[index]
        if not isinstance(shared, dict | None):
            raise TypeError(f"the device's memory is {shared!r}")
        for number, (start, dtype) in table["weights"].items():  # type: ignore[index]
            found[int(number)] = (int(start), getattr(torch, str(dtype)))
            if start % ALIGNMENT or not isinstance(found[int(number)][1], torch.dtype):
                raise ValueError(f"weight {number} at {start}, {dtype}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ProtocolError(
            f"the executor's table of lent weights makes no sense: {error!r}"
        ) from None
    return found, shared


def _tensor_at(
    memory: mmap.mmap | torch.Tensor, start: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> torch.Tensor:
    """Raises ValueError if it is not within the memory."""
    count = torch.Size(shape).numel()
    end = start + count * dtype.itemsize
    if start < 0 or end > len(memory):
        raise ValueError("beyond the end")
    if isinstance(memory, torch.Tensor):
        return memory[start:end].view(dtype).view(shape)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=start).view(shape)
