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

from symbiosis.errors import QuotaExceeded, RequestRefused
from symbiosis.transport import device_memory
from symbiosis.transport.arena import Laid
from symbiosis.transport.device_memory import ALIGNMENT
from symbiosis.wire.frames import Json
from symbiosis.wire.places import INLINE, Places, Room
from symbiosis.wire.tensors import TensorSpec, in_storage

_LEAST_BYTES = 16 << 20
_SHARE = 8
"""An eighth of the device's memory, at most, is given to all clients together."""

_MOST_WASTED = 4
"""Times what is needed: a larger block waits for who needs it, as long as there is memory."""


class Block(NamedTuple):
    """Memory of a device that another process can attach."""

    memory: torch.Tensor  # uint8 (n,)
    shared: Json  # see `device_memory.share`, which once is enough for


class DeviceBlocks:
    """The executor's side: a device's blocks for the clients of this process. Not thread-safe.

    A block that its client has let go of goes to the next one and never to the device, for whoever
    had it could still have it open: CUDA does not define what becomes of memory that is freed
    meanwhile.
    """

    def __init__(self, device: torch.device) -> None:
        self.identity = device_memory.identity(device)
        self._device = device
        self._most_bytes = device_memory.total_bytes(device) // _SHARE
        self._free: list[Block] = []
        self._all: list[Block] = []

    @property
    def all_bytes(self) -> int:
        """In blocks, whoever has them."""
        return sum(len(block.memory) for block in self._all)

    def take(self, num_bytes: int) -> Block:
        """A block of at least ``num_bytes`` for one client. Raises QuotaExceeded where that is too
        much, now or ever, RequestRefused where the device cannot share."""
        if num_bytes > self._most_bytes:
            raise QuotaExceeded(
                f"an exchange may have {self._most_bytes} bytes of the GPU's memory for activations"
            )
        size = max(_LEAST_BYTES, 1 << (num_bytes - 1).bit_length())
        if (block := self._fitting(num_bytes, size * _MOST_WASTED)) is not None:
            return block
        if self.all_bytes + size <= self._most_bytes:
            return self._made(size)
        if (block := self._fitting(num_bytes, self._most_bytes)) is not None:
            return block
        raise QuotaExceeded(
            f"clients have {self.all_bytes} bytes of the GPU's memory for activations, and may "
            f"have {self._most_bytes}; {size} more were wanted"
        )

    def give(self, block: Block) -> None:
        """Its client has let go of it. One that may not know yet that it must goes to nobody."""
        self._free.append(block)

    def _fitting(self, least: int, most: int) -> Block | None:
        fits = [block for block in self._free if least <= len(block.memory) <= most]
        if not fits:
            return None
        block = min(fits, key=lambda block: len(block.memory))
        self._free = [other for other in self._free if other is not block]
        return block

    def _made(self, size: int) -> Block:
        try:
            memory = device_memory.allocate(size, self._device).zero_()  # of whatever was there
        except torch.OutOfMemoryError:
            raise QuotaExceeded(f"the GPU has no {size} bytes left for activations") from None
        try:
            block = Block(memory, device_memory.share(memory))
        except RuntimeError as error:
            self._most_bytes = 0  # nor will it another time
            raise RequestRefused(f"this GPU's memory cannot be shared: {error}") from None
        self._all.append(block)
        return block


@functools.cache
def blocks_of(device: torch.device) -> DeviceBlocks:
    """Of this process: they outlive an executor, for its clients may."""
    return DeviceBlocks(device)


class DeviceArena:
    """The client's side: the block that it was given, for one exchange at a time."""

    def __init__(self, block: torch.Tensor) -> None:
        self.size_bytes = len(block)
        self._block = block

    def lay_out(
        self,
        tensors: tuple[torch.Tensor, ...],
        specs: tuple[TensorSpec, ...],
        expected: Sequence[int],
    ) -> Laid | None:
        """Copy the inputs in, from whatever device, and make room for results, which are
        ``expected`` to have so many bytes each; when it returns, they are there. None if there is
        nothing to place, or no room for all."""
        places, num_bytes = _places(specs, expected)
        if not 0 < num_bytes <= self.size_bytes:
            return None
        self.finish()  # the last results are copied out, maybe on another stream
        inline = []
        for start, spec, tensor in zip(places.inputs, specs, tensors, strict=True):
            if start == INLINE:
                inline.append(tensor)
            else:
                in_storage(self._block.untyped_storage(), start, spec).copy_(tensor)
        self.finish()
        result = functools.partial(self._result, places, tensors[0].device)
        return Laid(places, tuple(inline), result, None)

    def finish(self) -> None:
        """Until this process's copies into the block and out of it are done."""
        device_memory.wait_for_all(self._block.device)

    def _result(
        self, places: Places, device: torch.device, number: int, spec: TensorSpec
    ) -> torch.Tensor:
        place = in_storage(self._block.untyped_storage(), places.results[number].start, spec)
        return torch.empty(spec.shape, dtype=spec.dtype, device=device).copy_(place)


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
