"""Frames: a fixed 24-byte header, a small meta section, a raw payload. See ``docs/protocol.md``.

Over a network each of the three may be followed by its checksum (`wire.checksums`): the kind's
highest bit says so.

`FrameReader` is the receiving half as a state machine without a socket: it says where the next
bytes belong and turns them into frames. Knows lengths and limits; knows nothing of what the
meta section means.
"""

from __future__ import annotations

import enum
import json
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from symbiosis.errors import DamagedFrame, ExchangeFailed, ProtocolError, SymbiosisError
from symbiosis.wire.checksums import CHECKED, CHECKSUM, checksum
from symbiosis.wire.tensors import ALIGNMENT, TensorSpec, allocate, as_bytes, offsets

MAGIC = b"SY"
VERSION = 1
HEADER = struct.Struct("<2sBBIQQ")
"""magic 2s | version u8 | kind u8 | meta_bytes u32 | request u64 | payload_bytes u64"""

_PADDING = bytes(ALIGNMENT)

Json = dict[str, object]


class Kind(enum.IntEnum):
    """What a frame is for. c→e: from the client to the executor."""

    HELLO = 1  # c→e, JSON: who connects
    WELCOME = 2  # e→c, JSON: what is hosted
    REQUEST = 3  # c→e, JSON: one question outside the data path
    REPLY = 4  # e→c, JSON and payload: its answer
    EXCHANGE = 5  # c→e, binary: one operation on frozen weights
    RESULT = 6  # e→c, binary: its outcome
    ERROR = 7  # e→c, JSON: {"code", "message"}, for the request or (request 0) the connection
    PLACED = 8  # c→e, binary: an EXCHANGE with tensors in the arena, after where they lie
    ON_DEVICE = 9  # c→e, binary: the same in the executor's block of the GPU's memory


_KINDS = {int(kind): kind for kind in Kind}


class Limits(NamedTuple):
    """What a reader accepts, in bytes."""

    meta_bytes: int = 64 * 1024
    payload_bytes: int = 1 << 30


class Admitted(NamedTuple):
    """What ``admit`` says of a frame that may come in."""

    found: object = None  # it comes with the frame
    specs: tuple[TensorSpec, ...] | None = None  # of the tensors in the payload; None: of bytes


class Frame(NamedTuple):
    """One complete frame."""

    kind: Kind
    request: int
    meta: bytes
    tensors: tuple[torch.Tensor, ...]  # in the payload: as admitted, else one of uint8 (bytes,)
    payload: memoryview  # their bytes
    found: object  # what ``admit`` made of the meta section

    def json(self) -> Json:
        """The meta section as a JSON object; raises ProtocolError if it is not one."""
        try:
            value = json.loads(self.meta)
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"a {self.kind.name} frame holds no valid JSON: {error}") from None
        if not isinstance(value, dict):
            raise ProtocolError(f"a {self.kind.name} frame holds no JSON object")
        return value


class Rejected(NamedTuple):
    """A well-formed frame that ``admit`` refused; its payload was skipped, unread and unstored."""

    request: int
    error: SymbiosisError


def pack_header(kind: Kind, request: int, meta_bytes: int, payload_bytes: int) -> bytes:
    """The 24 bytes before a frame's meta section."""
    return HEADER.pack(MAGIC, VERSION, kind, meta_bytes, request, payload_bytes)


def json_frame(kind: Kind, request: int, value: Json, payload_bytes: int = 0) -> bytes:
    """Header and meta of a JSON frame; its payload, if any, follows."""
    meta = json.dumps(value, separators=(",", ":")).encode()
    return pack_header(kind, request, len(meta), payload_bytes) + meta


def exchange_parts(
    kind: Kind,
    request: int,
    meta: bytes,
    specs: tuple[TensorSpec, ...],
    tensors: tuple[torch.Tensor, ...],
) -> list[bytes | memoryview]:
    """The buffers of a frame with tensors, ready for one gathering send."""
    if len(tensors) == 1:
        body = as_bytes(tensors[0])
        return [pack_header(kind, request, len(meta), len(body)) + meta, body]
    starts, end = offsets(specs)
    parts: list[bytes | memoryview] = [pack_header(kind, request, len(meta), end) + meta]
    at = 0
    for start, tensor in zip(starts, tensors, strict=True):
        if start > at:
            parts.append(_PADDING[: start - at])
        body = as_bytes(tensor)
        parts.append(body)
        at = start + len(body)
    return parts


def error_frame(request: int, error: SymbiosisError) -> bytes:
    """An ERROR frame for ``request``."""
    return json_frame(Kind.ERROR, request, {"code": error.code, "message": str(error)})


class Postponed(Exception):
    """Raised by ``admit``: not now. The frame stays in the reader, to be admitted later."""


Admit = Callable[[Kind, bytes, int], Admitted]
"""Called with kind, meta and payload length before the payload's memory is allocated. Raises to
refuse: a ProtocolError ends the connection, any other error rejects the one frame, `Postponed`
leaves it in the reader. The tensors it finds in a payload are as long as the payload."""


def _admit_all(kind: Kind, meta: bytes, payload_bytes: int) -> Admitted:
    """Accept whatever is within the limits."""
    return Admitted()


class FrameReader:
    """Turns bytes into frames, without I/O.

    ``buffer()`` returns the memory where the next received bytes belong; after receiving ``n``
    of them call ``received(n)``, then ``next()`` until it returns None. (``advance(n)`` is both.)
    Who does not want the next frame yet leaves it in here and does not receive. A small frame
    costs one receive; a large payload is received straight into its own buffer.

    Not thread-safe: one reader belongs to one connection. After a ProtocolError the stream is
    out of step and the reader must not be used again.
    """

    _SCRATCH_BYTES = 1 << 16

    def __init__(
        self, limits: Limits = Limits(), admit: Admit = _admit_all, *, checked: bool | None = None
    ) -> None:
        """``checked``: whether frames must have checksums; None: all as the first one does."""
        self.checked = checked
        self._limits = limits
        self._admit = admit
        self._view = memoryview(bytearray(self._SCRATCH_BYTES))
        self._begin = 0  # view[begin:end] is received and not yet used
        self._end = 0
        self._coming: Frame | None = None  # its payload is
        self._payload: memoryview | None = None
        self._filled = 0
        self._skip = 0  # bytes of a rejected payload still to be dropped
        self._seed: int | None = None  # of the coming payload's checksum, if it has one
        self._unverified: memoryview | None = None  # a whole payload whose checksum is coming

    @property
    def mid_frame(self) -> bool:
        """True while a frame has begun and is not complete."""
        return self._coming is not None or self._end > self._begin or self._skip > 0

    @property
    def in_payload(self) -> bool:
        """True while a payload is coming, or what is left of a refused one."""
        return self._payload is not None or self._unverified is not None or self._skip > 0

    def buffer(self) -> memoryview:
        """Where to put the next bytes; never empty."""
        if self._payload is not None:
            return self._payload[self._filled :]
        if self._begin:
            self._view[: self._end - self._begin] = self._view[self._begin : self._end]
            self._begin, self._end = 0, self._end - self._begin
        if self._end == len(self._view):  # a meta section larger than the scratch
            grown = memoryview(bytearray(2 * self._end))
            grown[: self._end] = self._view
            self._view = grown
        return self._view[self._end :]

    def received(self, num_bytes: int) -> None:
        """Account for ``num_bytes`` received into ``buffer()``."""
        if self._payload is not None:
            self._filled += num_bytes
        else:
            self._end += num_bytes

    def advance(self, num_bytes: int) -> Iterator[Frame | Rejected]:
        """Account for ``num_bytes`` received into ``buffer()``; yield what is now complete."""
        self.received(num_bytes)
        while (complete := self.next()) is not None:
            yield complete

    def next(self) -> Frame | Rejected | None:
        """The next complete frame, or None until more has been received."""
        if self._payload is not None:
            whole = self._filled == len(self._payload)
            return self._verify(self._payload) if whole else None
        if self._unverified is not None:
            return self._verify(self._unverified)
        if self._skip:
            dropped = min(self._skip, self._end - self._begin)
            self._begin += dropped
            self._skip -= dropped
            if self._skip:
                return None
        available = self._end - self._begin
        if available < HEADER.size:
            return None
        magic, version, kind, meta_bytes, request, payload_bytes = HEADER.unpack_from(
            self._view, self._begin
        )
        seed = None
        if kind & CHECKED or self.checked is not False:  # a network, or a first frame
            if available < HEADER.size + self._checksum_bytes(kind):
                return None
            if kind & CHECKED:
                header = self._view[self._begin : self._begin + HEADER.size]
                seed = self._check("header", header, self._begin + HEADER.size, 0)
                kind &= ~CHECKED
        known = _KINDS.get(kind)
        limits = self._limits
        if (
            magic != MAGIC
            or version != VERSION
            or known is None
            or meta_bytes > limits.meta_bytes
            or payload_bytes > limits.payload_bytes
        ):
            raise _malformed(magic, version, kind, meta_bytes, payload_bytes, limits)
        sum_bytes = 0 if seed is None else CHECKSUM.size
        if available < HEADER.size + meta_bytes + 2 * sum_bytes:
            return None
        start = self._begin + HEADER.size + sum_bytes
        end = start + meta_bytes
        meta = bytes(self._view[start:end])
        if seed is not None:
            seed = self._check("meta section", meta, end, seed)
        begin, self._begin = self._begin, end + sum_bytes
        self._seed = seed if payload_bytes else None
        try:
            found, specs = self._admit(known, meta, payload_bytes)
            tensors, payload = _allocated(specs, payload_bytes)
        except Postponed:
            self._begin = begin
            return None
        except ProtocolError:
            raise
        except SymbiosisError as error:
            self._skip = payload_bytes + (sum_bytes if payload_bytes else 0)
            return Rejected(request, error)
        self._coming = Frame(known, request, meta, tensors, payload, found)
        return self._start_payload(payload, payload_bytes)

    def _checksum_bytes(self, kind: int) -> int:
        """Of each of the frame's checksums, 0 if it has none; raises ProtocolError where it should
        be otherwise. (An executor may have to refuse a client before it knows of any.)"""
        has = bool(kind & CHECKED)
        if self.checked is None:
            self.checked = has
        if has != self.checked and kind != Kind.ERROR:
            raise ProtocolError(
                f"a frame with{'' if has else 'out'} checksums on a connection with"
                f"{'' if self.checked else 'out'}"
            )
        return CHECKSUM.size if has else 0

    def _check(self, section: str, data: memoryview | bytes, at: int, seed: int) -> int:
        """The checksum of ``data``, which is the one at ``at``; else raises DamagedFrame."""
        found = checksum(data, seed)
        if found != CHECKSUM.unpack_from(self._view, at)[0]:
            raise DamagedFrame(f"a frame's {section} was damaged on the way: wrong checksum")
        return found

    def _verify(self, payload: memoryview) -> Frame | None:
        """The frame whose payload is whole, if its checksum is there too."""
        if self._seed is None:
            return self._finish()
        self._payload, self._unverified = None, payload
        if self._end - self._begin < CHECKSUM.size:
            return None
        self._check("payload", payload, self._begin, self._seed)
        self._begin += CHECKSUM.size
        self._unverified = None
        return self._finish()

    def _start_payload(self, payload: memoryview, payload_bytes: int) -> Frame | None:
        here = min(payload_bytes, self._end - self._begin)
        if here:
            payload[:here] = self._view[self._begin : self._begin + here]
            self._begin += here
        if here == payload_bytes:
            return self._verify(payload)
        self._payload, self._filled = payload, here
        return None

    def _finish(self) -> Frame:
        assert self._coming is not None
        complete, self._coming, self._payload = self._coming, None, None
        return complete


def _allocated(
    specs: tuple[TensorSpec, ...] | None, num_bytes: int
) -> tuple[tuple[torch.Tensor, ...], memoryview]:
    """Memory for a payload; raises ExchangeFailed where there is none."""
    if specs is None:
        specs = (TensorSpec(torch.uint8, (num_bytes,)),)
    try:
        return allocate(specs, num_bytes)
    except (RuntimeError, MemoryError):
        raise ExchangeFailed(
            f"out of memory: no {num_bytes} bytes for a payload; send fewer rows at a time"
        ) from None


def _malformed(
    magic: bytes, version: int, kind: int, meta_bytes: int, payload_bytes: int, limits: Limits
) -> ProtocolError:
    """What is wrong with a header that is not acceptable."""
    if magic != MAGIC:
        # Which bytes it starts with is not said: out of step, they are somebody's payload.
        return ProtocolError(f"a frame does not start with {MAGIC!r}: not this protocol")
    if version != VERSION:
        return ProtocolError(
            f"protocol version {version} on the wire, {VERSION} here: use the same release"
        )
    if kind not in _KINDS:
        return ProtocolError(f"unknown kind of frame: {kind}")
    if meta_bytes > limits.meta_bytes:
        return ProtocolError(
            f"a meta section of {meta_bytes} bytes; the limit is {limits.meta_bytes}"
        )
    return ProtocolError(f"a payload of {payload_bytes} bytes; the limit is {limits.payload_bytes}")
