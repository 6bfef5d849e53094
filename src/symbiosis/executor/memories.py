"""What one client shares with the executor, besides the socket: its arena of host memory, and a
block of the GPU's. Knows memory; knows no sockets and no operations."""

from __future__ import annotations

import logging
import os

from symbiosis.errors import ProtocolError, RequestRefused
from symbiosis.transport.arena import ArenaUnfit, AttachedArena, attached
from symbiosis.transport.device_arena import Block, DeviceBlocks
from symbiosis.wire.frames import Json, Kind

logger = logging.getLogger(__name__)


class Memories:
    """Of one connection. Not thread-safe."""

    def __init__(self, blocks: DeviceBlocks | None) -> None:
        """``blocks`` are what clients of this executor may have of its GPU."""
        self._descriptors: tuple[int, ...] = ()  # came with HELLO, not yet mapped
        self._arena: AttachedArena | None = None
        self._blocks = blocks
        self._block: Block | None = None
        self._on_device: AttachedArena | None = None

    def came(self, descriptors: tuple[int, ...]) -> None:
        """While the client greets. Raises ProtocolError at the second one."""
        if descriptors and self._descriptors:
            _close(descriptors)
            raise ProtocolError("a second descriptor came; a client hands over one arena")
        self._descriptors += descriptors

    def map_arena(self, announced: bool) -> bool | str | None:
        """The client has greeted: whether its arena is taken, or why it is not; None without one.
        Raises ProtocolError."""
        if announced != bool(self._descriptors):
            raise ProtocolError("an arena is announced and its descriptor sent, both or neither")
        if not announced:
            return None
        try:
            self._arena = attached(self._descriptors[0])
            return True
        except (ArenaUnfit, OSError) as error:
            logger.warning("an arena is not taken: %s", error)
            return str(error)
        finally:
            self._drop_descriptors()

    def give_block(self, question: Json) -> Json:
        """A block of the GPU's memory, in place of the one before, to a client that asks for it
        between exchanges; for 0 bytes none. Raises RequestRefused, QuotaExceeded."""
        devices, num_bytes = question.get("devices"), question.get("bytes")
        if not isinstance(devices, list) or type(num_bytes) is not int or num_bytes < 0:
            raise RequestRefused("memory is asked for with the client's devices, and how much")
        if num_bytes == 0:
            self._take_block_back()
            return {"device": None}
        if self._blocks is None or self._blocks.identity not in devices:
            raise RequestRefused("this executor exchanges through no device that the client sees")
        block = self._blocks.take(num_bytes)
        self._take_block_back()
        self._block, self._on_device = block, AttachedArena(block.memory)
        return {"device": self._blocks.identity, **block.shared}

    def of(self, kind: Kind) -> AttachedArena:
        """Where the tensors of a PLACED or ON_DEVICE exchange lie. Raises ProtocolError."""
        arena = self._arena if kind is Kind.PLACED else self._on_device
        if arena is None:
            raise ProtocolError("an exchange with places, but no arena is attached")
        return arena

    def close(self, *, has_gone: bool) -> None:
        """The connection ends, idempotent; because the client ``has_gone``? One that does not know
        yet may still use its block, which is nobody else's then. Who computes in the memory keeps
        it alive."""
        self._drop_descriptors()
        self._arena = None
        if has_gone:
            self._take_block_back()
        self._block = self._on_device = None

    def _drop_descriptors(self) -> None:
        _close(self._descriptors)
        self._descriptors = ()

    def _take_block_back(self) -> None:
        if self._block is not None:
            assert self._blocks is not None
            self._blocks.give(self._block)
        self._block = self._on_device = None


def _close(descriptors: tuple[int, ...]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
