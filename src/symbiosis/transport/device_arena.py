"""An executor's block of GPU memory through which one client of its host exchanges activations.

The arena's counterpart on a device: what would cross to the host and back is copied within the
device, or from one GPU to its peer. The executor has the block and gives it to one client at a
time; that one lays its exchanges out in it, one after the other, and copies results out. Both
sides wait for their own copies before they send the frame that tells of them: a kernel that fails,
or never ends, stays the matter of whoever launched it. Knows memory and tensors; knows nothing of
frames or operations.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from symbiosis.errors import RequestRefused
from symbiosis.transport import device_memory
from symbiosis.transport.arena import Laid
from symbiosis.transport.device_memory import ALIGNMENT
from symbiosis.wire.frames import Json
from symbiosis.wire.places import INLINE, Places, Room
from symbiosis.wire.tensors import TensorSpec, in_storage

_LEAST_BYTES = 16 << 20
_SHARE = 8
"""An eighth of the device's memory, at most, is given to all clients together."""


class Block(NamedTuple):
    """Memory of a device that another process can attach."""

    memory: torch.Tensor  # uint8 (n,)
    shared: Json  # see `device_memory.share`, which once is enough for


class DeviceBlocks:
    """The executor's side: blocks for its clients. Not thread-safe.

    A block that has come back goes to the next client and never to the device, for whoever had it
    could still have it open: CUDA does not define what becomes of memory that is freed meanwhile.
    """

    def __init__(self, device: torch.device) -> None:
        self.identity = device_memory.identity(device)
        self._device = device
        self._most_bytes = device_memory.total_bytes(device) // _SHARE
        self._free: list[Block] = []
        self._all_bytes = 0

    def take(self, num_bytes: int) -> Block:
        """A block of at least ``num_bytes`` for one client. Raises RequestRefused."""
        fits = [block for block in self._free if len(block.memory) >= num_bytes]
        if fits:
            block = min(fits, key=lambda block: len(block.memory))
            self._free = [other for other in self._free if other is not block]
            return block
        size = max(_LEAST_BYTES, 1 << (num_bytes - 1).bit_length())
        if self._all_bytes + size > self._most_bytes:
            raise RequestRefused(
                f"{size} bytes of the GPU's memory for activations, beside {self._all_bytes}, are "
                f"more than the {self._most_bytes} that all clients may have"
            )
        try:
            memory = device_memory.allocate(size, self._device)
            block = Block(memory, device_memory.share(memory))
        except RuntimeError as error:  # it is full, or cannot share
            raise RequestRefused(f"no {size} bytes of the GPU for activations: {error}") from None
        self._all_bytes += len(memory)
        return block

    def give(self, block: Block) -> None:
        """Its client has left, or has got another."""
        self._free.append(block)


class DeviceArena:
    """The client's side: the block that it was given, for one exchange at a time."""

    def __init__(self, block: torch.Tensor) -> None:
        self.size_bytes = len(block)
        self._device = block.device
        self._storage = block.untyped_storage()

    def lay_out(
        self,
        tensors: tuple[torch.Tensor, ...],
        specs: tuple[TensorSpec, ...],
        expected: Sequence[int],
    ) -> Laid | None:
        """Copy the inputs in, from whatever device, and make room for results, which are
        ``expected`` to have so many bytes each; when it returns, they are there and the last
        results have been copied out. None if there is nothing to place, or no room for all."""
        places, num_bytes = _places(specs, expected)
        if not 0 < num_bytes <= self.size_bytes:
            return None
        inline = []
        for start, spec, tensor in zip(places.inputs, specs, tensors, strict=True):
            if start == INLINE:
                inline.append(tensor)
            else:
                in_storage(self._storage, start, spec).copy_(tensor)
        device_memory.finish(self._device)
        if tensors[0].device != self._device:
            device_memory.finish(tensors[0].device)
        return Laid(places, tuple(inline), functools.partial(self._result, places), None)

    def _result(self, places: Places, number: int, spec: TensorSpec) -> torch.Tensor:
        return in_storage(self._storage, places.results[number].start, spec).clone()


def bytes_needed(specs: tuple[TensorSpec, ...], expected: Sequence[int]) -> int:
    """For an exchange with these inputs and results of so many bytes."""
    return _places(specs, expected)[1]


def _places(specs: tuple[TensorSpec, ...], expected: Sequence[int]) -> tuple[Places, int]:
    """One after the other, and where they end."""
    end, inputs, rooms = 0, [], []
    for spec in specs:
        placed = spec.dtype.is_floating_point and spec.num_bytes > 0
        inputs.append(end if placed else INLINE)
        end += _aligned(spec.num_bytes) if placed else 0
    for size in expected:
        rooms.append(Room(end, size))
        end += _aligned(size)
    return Places(tuple(inputs), tuple(rooms)), end


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
