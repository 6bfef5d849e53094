"""Memory that a client shares with the executor on its host, so that large tensors cross no socket.

The client makes it and alone decides what lies where; the executor maps it once. A place is free
again when the last tensor that sees it has died, and never before. Knows memory and tensors;
knows nothing of frames or operations.
"""

from __future__ import annotations

import bisect
import ctypes
import fcntl
import functools
import logging
import mmap
import os
import socket
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from symbiosis.errors import ProtocolError
from symbiosis.transport import device_memory
from symbiosis.wire.places import INLINE, Places, Room
from symbiosis.wire.tensors import ITEM_BYTES, TensorSpec, in_storage

logger = logging.getLogger(__name__)

PLACED_BYTES = 64 << 10
"""Tensors from this size on lie in the arena; below, the socket is as fast."""

MAX_ARENA_BYTES = 64 << 30
"""Address space that an executor gives to one client; memory is taken as it is used."""

_PAGE = mmap.PAGESIZE
_TRIM_EVERY = 1024
_TRIM_SLACK_BYTES = 64 << 20
_MOST_LEARNED = 16384
_MOST_DESCRIPTORS = 8


class FreeSpace:
    """Which ranges are free: the lowest that fits is taken, so that memory stays warm and low.

    Pure. Not thread-safe.
    """

    def __init__(self, size: int) -> None:
        self._starts, self._sizes = [0], [size]  # by address; no two touch

    def take(self, size: int) -> int | None:
        """The start of ``size`` bytes that are free no longer; None if nothing is large enough."""
        for i, free in enumerate(self._sizes):
            if free >= size:
                start = self._starts[i]
                if free == size:
                    del self._starts[i], self._sizes[i]
                else:
                    self._starts[i], self._sizes[i] = start + size, free - size
                return start
        return None

    def give(self, start: int, size: int) -> None:
        """A range that was taken is free again."""
        i = bisect.bisect(self._starts, start)
        if i < len(self._starts) and start + size == self._starts[i]:
            size += self._sizes[i]
            del self._starts[i], self._sizes[i]
        if i and self._starts[i - 1] + self._sizes[i - 1] == start:
            self._sizes[i - 1] += size
        else:
            self._starts.insert(i, start)
            self._sizes.insert(i, size)


class _Hold(weakref.ref[memoryview]):
    """Watches the buffer that the tensors in one place share; called when they are all dead."""

    __slots__ = ("room",)
    room: Room


class _Learned(NamedTuple):
    """What came of an input of so many elements."""

    elements: int
    specs: tuple[TensorSpec, ...]
    sizes: tuple[int, ...]  # in bytes


class ResultSizes:
    """How large results will be: results of the same product are as large per input element as
    they last were. ``product`` says what is computed, apart from the number of rows."""

    def __init__(self) -> None:
        self._learned: dict[object, _Learned] = {}

    def expected(self, product: object, elements: int) -> list[int]:
        """In bytes, of an input of so many elements; empty if nothing is known."""
        learned = self._learned.get(product)
        if learned is None or not learned.elements:
            return []
        return [-(-size * elements // learned.elements) for size in learned.sizes]

    def learn(self, product: object, elements: int, specs: tuple[TensorSpec, ...]) -> None:
        """``product`` of an input of ``elements`` had these results."""
        known = self._learned.get(product)
        if known is not None and known[:2] == (elements, specs):
            return
        if len(self._learned) >= _MOST_LEARNED:
            self._learned.clear()
        self._learned[product] = _Learned(elements, specs, tuple(s.num_bytes for s in specs))


class Laid(NamedTuple):
    """One exchange laid out in an arena. Its inputs' places are held as long as it lives."""

    places: Places
    inline: tuple[torch.Tensor, ...]  # inputs that travel in the payload
    result: Callable[[int, TensorSpec], torch.Tensor]  # of that number, where it lies
    held: object

    def results(
        self, specs: tuple[TensorSpec, ...], came: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        """The results where they lie: in their places, or ``came`` with the answer."""
        rest = iter(came)
        return tuple(
            self.result(i, spec) if self.places.holds(i, spec.num_bytes) else next(rest)
            for i, spec in enumerate(specs)
        )

    def outside(self, specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        """Those of the results that come in the payload."""
        return tuple(s for i, s in enumerate(specs) if not self.places.holds(i, s.num_bytes))


class Arena:
    """The client's side. Not thread-safe, but tensors may die in any thread."""

    def __init__(self, size_bytes: int) -> None:
        """Raises OSError where the system has no such memory."""
        self.size_bytes = size_bytes // _PAGE * _PAGE
        self.descriptor = os.memfd_create("symbiosis", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.descriptor, self.size_bytes)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, seals)
            self._map = mmap.mmap(self.descriptor, self.size_bytes)
        except BaseException:
            self.close_descriptor()
            raise
        self._view = memoryview(self._map)
        self._free = FreeSpace(self.size_bytes)
        self._holds: dict[int, _Hold] = {}  # by start
        self._dead: deque[weakref.ref[memoryview]] = deque()
        self._touched = self._peak = 0  # highest ends: ever used, used since the last trim
        self._until_trim = _TRIM_EVERY
        self._kept: list[tuple[int, bytes]] = []
        _privatise_after_fork(self)

    def close_descriptor(self) -> None:
        """After it has been handed over; the memory stays as long as a tensor sees it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def close(self) -> None:
        """No more places; those that tensors see stay as they are. Idempotent."""
        self.close_descriptor()
        self._reclaim()
        watched, self._holds = self._holds, {}
        for hold in watched.values():
            block = hold()
            if block is not None:
                self._hold(block, hold.room, self._forget)
            del block
        if self._holds:
            _closed.add(self)

    def _forget(self, hold: weakref.ref[memoryview]) -> None:
        assert isinstance(hold, _Hold)
        self._holds.pop(hold.room.start, None)
        if not self._holds:
            _closed.discard(self)

    def lay_out(
        self,
        tensors: tuple[torch.Tensor, ...],
        specs: tuple[TensorSpec, ...],
        expected: Sequence[int],
    ) -> Laid | None:
        """Copy the large inputs in and make room for large results, which are ``expected`` to have
        so many bytes each. None if nothing is large or nothing is free.
        """
        large = [s.num_bytes >= PLACED_BYTES and s.dtype.is_floating_point for s in specs]
        if not any(large) and all(size < PLACED_BYTES for size in expected):
            return None
        self._reclaim()
        inputs = [
            self._block(s.num_bytes) if f else None for s, f in zip(specs, large, strict=True)
        ]
        blocks = [self._block(size) if size >= PLACED_BYTES else None for size in expected]
        if not any(inputs) and not any(blocks):
            return None
        starts, inline, held = [], [], []
        for block, tensor, spec in zip(inputs, tensors, specs, strict=True):
            if block is None:
                starts.append(INLINE)
                inline.append(tensor)
            else:
                starts.append(block[0])
                held.append(block[1])
                _in_block(block[1], spec).copy_(tensor)
        rooms = tuple(Room(b[0], len(b[1])) if b else Room(0, 0) for b in blocks)
        memory = tuple(b[1] if b else None for b in blocks)
        result = functools.partial(_result_in, memory)
        return Laid(Places(tuple(starts), rooms), tuple(inline), result, held)

    @property
    def held_bytes(self) -> int:
        """In places that a tensor sees."""
        self._reclaim()
        return sum(hold.room.size for hold in self._holds.values())

    def before_fork(self) -> None:
        """Keep what tensors see now for the child."""
        rooms = [hold.room for hold in list(self._holds.values())]
        self._kept = [(start, bytes(self._view[start : start + size])) for start, size in rooms]

    def after_fork(self, *, child: bool) -> None:
        """In the child: put memory of its own in place of the shared one."""
        if child:
            address = torch.frombuffer(self._map, dtype=torch.uint8).data_ptr()
            _map_private(address, self.size_bytes)
            for start, data in self._kept:
                self._view[start : start + len(data)] = data
        self._kept = []

    def _block(self, num_bytes: int) -> tuple[int, memoryview] | None:
        size = -(-num_bytes // _PAGE) * _PAGE
        start = self._free.take(size)
        if start is None:
            return None
        block = self._view[start : start + size]
        self._hold(block, Room(start, size), self._dead.append)
        self._peak = max(self._peak, start + size)
        return start, block

    def _hold(
        self, block: memoryview, room: Room, when_dead: Callable[[weakref.ref[memoryview]], None]
    ) -> None:
        hold = _Hold(block, when_dead)
        hold.room = room
        self._holds[room.start] = hold

    def _reclaim(self) -> None:
        """Take back the places whose tensors have died, in whichever thread they did."""
        while self._dead:
            hold = self._dead.popleft()
            assert isinstance(hold, _Hold)
            del self._holds[hold.room.start]
            self._free.give(*hold.room)
        self._until_trim -= 1
        if self._until_trim <= 0:
            self._trim()

    def _trim(self) -> None:
        """Return memory to the system that has not been used for long."""
        self._until_trim = _TRIM_EVERY
        self._touched = max(self._touched, self._peak)
        if self._touched - self._peak > _TRIM_SLACK_BYTES:
            self._map.madvise(mmap.MADV_REMOVE, self._peak, self._touched - self._peak)
            self._touched = self._peak
        self._peak = max((sum(hold.room) for hold in self._holds.values()), default=0)


_forkable: weakref.WeakSet[Arena] = weakref.WeakSet()
_closed: set[Arena] = set()  # that tensors still see; held here for `_watch_forks`
MAP_NORESERVE = 0x4000


def _privatise_after_fork(arena: Arena) -> None:
    """Tensors in a forked child must not change when the parent uses their places again."""
    _watch_forks()
    _forkable.add(arena)


@functools.cache
def _watch_forks() -> None:
    def before() -> None:
        for arena in list(_forkable):
            arena.before_fork()

    def after(child: bool) -> None:
        for arena in list(_forkable):
            arena.after_fork(child=child)

    os.register_at_fork(
        before=before,
        after_in_parent=lambda: after(False),
        after_in_child=lambda: after(True),
    )


def _map_private(address: int, size: int) -> None:
    mmap_at = ctypes.CDLL(None).mmap
    mmap_at.restype = ctypes.c_void_p
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10 | MAP_NORESERVE  # 0x10: MAP_FIXED
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    length, no_offset = ctypes.c_size_t(size), ctypes.c_long(0)
    found = mmap_at(ctypes.c_void_p(address), length, protection, flags, -1, no_offset)
    assert found == address, "no memory for a forked child's tensors"


def _result_in(
    blocks: tuple[memoryview | None, ...], number: int, spec: TensorSpec
) -> torch.Tensor:
    block = blocks[number]
    assert block is not None
    return _in_block(block, spec)


def _in_block(block: memoryview, spec: TensorSpec) -> torch.Tensor:
    """A tensor at the start of ``block``; its storage keeps the block alive."""
    count = spec.num_bytes // ITEM_BYTES[spec.dtype]
    storage = torch.frombuffer(block, dtype=spec.dtype, count=count).untyped_storage()
    return in_storage(storage, 0, spec)


def attached(descriptor: int) -> AttachedArena:
    """A client's arena, mapped. The caller keeps ``descriptor``. Raises ArenaUnfit, OSError."""
    mapped = mmap.mmap(descriptor, checked_size(descriptor, MAX_ARENA_BYTES))
    return AttachedArena(torch.frombuffer(mapped, dtype=torch.uint8))


class AttachedArena:
    """The executor's side: memory that it shares with one client. Tensors in it keep it alive."""

    def __init__(self, memory: torch.Tensor) -> None:
        """``memory`` is uint8 (n,), on any device."""
        self.size_bytes = len(memory)
        self._storage = memory.untyped_storage()

    def inputs(
        self, places: Places, specs: tuple[TensorSpec, ...], came: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        """The input tensors, in the arena or as they ``came`` in the payload; ``places`` have been
        checked."""
        rest = iter(came)
        return tuple(
            next(rest) if start == INLINE else in_storage(self._storage, start, spec)
            for start, spec in zip(places.inputs, specs, strict=True)
        )

    def place(
        self, places: Places, number: int, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> torch.Tensor | None:
        """The memory for the result of that number, if the client has made room for it."""
        spec = TensorSpec(dtype, shape)
        if not places.holds(number, spec.num_bytes):
            return None
        return in_storage(self._storage, places.results[number].start, spec)

    def deliver(
        self, places: Places, results: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        """Write the results into their places, where they are not there already; when it returns,
        they are there. Those that have none are returned."""
        rest, copied = [], False
        for number, result in enumerate(results):
            place = self.place(places, number, result.dtype, tuple(result.shape))
            if place is None:
                rest.append(result)
            elif place.data_ptr() != result.data_ptr():
                place.copy_(result)
                copied = True
        if copied:
            device_memory.wait_for_stream(self._storage.device)
        return tuple(rest)


class ArenaUnfit(Exception):
    """A descriptor that cannot be mapped safely."""


def checked_size(descriptor: int, most_bytes: int) -> int:
    """The size of the memory behind ``descriptor``, about which nothing may ever raise SIGBUS
    here. Raises ArenaUnfit."""
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError:
        raise ArenaUnfit("the descriptor is not that of a memfd") from None
    if not seals & fcntl.F_SEAL_SHRINK:
        raise ArenaUnfit("the memory is not sealed against shrinking")
    if os.fstatvfs(descriptor).f_bsize != _PAGE:  # huge pages may be missing on access
        raise ArenaUnfit("the memory is not made of ordinary pages")
    size = os.fstat(descriptor).st_size
    if not 0 < size <= most_bytes:
        raise ArenaUnfit(f"{size} bytes; an arena has 1 to {most_bytes}")
    return size


class Received(NamedTuple):
    """What came in one receive: the number of bytes, and descriptors that are now ours."""

    num_bytes: int
    descriptors: tuple[int, ...]


def receive_with_descriptors(connection: socket.socket, buffer: memoryview) -> Received:
    """Like ``recv_into``, for memory that a peer hands over; raises ProtocolError, and keeps none,
    for more than one descriptor."""
    room = socket.CMSG_SPACE(_MOST_DESCRIPTORS * 4)
    received, ancillary, flags, _ = connection.recvmsg_into([buffer], room, socket.MSG_CMSG_CLOEXEC)
    descriptors = [
        int.from_bytes(data[at : at + 4], "little")
        for level, kind, data in ancillary
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
        for at in range(0, len(data) - len(data) % 4, 4)
    ]
    if len(descriptors) > 1 or (descriptors and flags & socket.MSG_CTRUNC):
        for descriptor in descriptors:
            os.close(descriptor)
        raise ProtocolError("several descriptors came at once; a peer hands over one")
    return Received(received, tuple(descriptors))
