"""`FrameReader`: any chunking of the stream gives the same frames; bad bytes are refused."""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Iterable

import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from symbiosis.errors import ConnectionLost, ExchangeFailed, InvalidInput, ProtocolError
from symbiosis.wire.checksums import checked
from symbiosis.wire.frames import (
    Admitted,
    Frame,
    FrameReader,
    Kind,
    Limits,
    Rejected,
    error_frame,
    json_frame,
)
from symbiosis.wire.tensors import ALIGNMENT, TensorSpec, as_bytes, offsets

Sent = tuple[Kind, int, bytes, bytes]


def wire(kind: int, request: int, meta: bytes, payload: bytes = b"") -> bytes:
    """A frame as the protocol describes it, independently of the package."""
    return (
        struct.pack("<2sBBIQQ", b"SY", 1, kind, len(meta), request, len(payload)) + meta + payload
    )


def feed(reader: FrameReader, data: bytes, chunks: Iterable[int]) -> list[Frame | Rejected]:
    """Hand ``data`` to ``reader`` in pieces of at most these sizes, as a socket would."""
    found: list[Frame | Rejected] = []
    at = 0
    for chunk in chunks:
        if at == len(data):
            break
        buffer = reader.buffer()
        assert len(buffer) > 0
        piece = data[at : at + min(chunk, len(buffer))]
        buffer[: len(piece)] = piece
        at += len(piece)
        found.extend(reader.advance(len(piece)))
    assert at == len(data)
    return found


def whole(reader: FrameReader, data: bytes) -> list[Frame | Rejected]:
    return feed(reader, data, itertools.repeat(len(data)))


def plain(frame: Frame | Rejected) -> Sent:
    assert isinstance(frame, Frame)
    return frame.kind, frame.request, frame.meta, bytes(frame.payload)


frames = st.lists(
    st.tuples(
        st.sampled_from(Kind),
        st.integers(0, 2**64 - 1),
        st.binary(max_size=90),
        st.one_of(st.just(b""), st.binary(max_size=300)),
    ),
    max_size=6,
)
chunkings = st.lists(st.integers(1, 400), min_size=1, max_size=12).map(itertools.cycle)


@given(frames, chunkings)
def test_any_chunking_gives_the_same_frames(sent: list[Sent], chunks: Iterable[int]) -> None:
    reader = FrameReader()
    found = feed(reader, b"".join(wire(*frame) for frame in sent), chunks)
    assert [plain(frame) for frame in found] == sent
    assert not reader.mid_frame


@given(frames)
def test_one_byte_at_a_time(sent: list[Sent]) -> None:
    found = feed(FrameReader(), b"".join(wire(*frame) for frame in sent), itertools.repeat(1))
    assert [plain(frame) for frame in found] == sent


def test_many_frames_in_one_read() -> None:
    sent = [(Kind.EXCHANGE, n, b"meta", bytes(n % 7)) for n in range(1000)]
    found = whole(FrameReader(), b"".join(wire(*frame) for frame in sent))
    assert [plain(frame) for frame in found] == sent


@pytest.mark.parametrize("chunk", [1 << 30, 65536, 40_000, 4097])
def test_payloads_larger_than_the_scratch_buffer(chunk: int) -> None:
    payload = bytes(range(256)) * 2000
    sent = [(Kind.RESULT, 1, b"a", payload), (Kind.RESULT, 2, b"", payload[:70_000])]
    reader = FrameReader()
    found = feed(reader, b"".join(wire(*frame) for frame in sent), itertools.repeat(chunk))
    assert [plain(frame) for frame in found] == sent


@pytest.mark.parametrize("chunk", [1 << 30, 5000])
def test_meta_sections_larger_than_the_scratch_buffer(chunk: int) -> None:
    meta = bytes(range(256)) * 2000
    sent = [(Kind.WELCOME, 0, meta, b"xyz"), (Kind.REPLY, 1, meta, b"")]
    reader = FrameReader(Limits(meta_bytes=1 << 20))
    found = feed(reader, b"".join(wire(*frame) for frame in sent), itertools.repeat(chunk))
    assert [plain(frame) for frame in found] == sent


def test_payloads_are_aligned() -> None:
    for frame in whole(FrameReader(), wire(5, 1, b"m", bytes(100)) + wire(5, 2, b"me", bytes(9))):
        assert isinstance(frame, Frame)
        assert frame.tensors[0].data_ptr() % ALIGNMENT == 0


@pytest.mark.parametrize("checks", [False, True])
@pytest.mark.parametrize("chunk", [1, 60, 1 << 30])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_payload_is_the_tensors_that_were_admitted(count: int, chunk: int, checks: bool) -> None:
    """On the CPU, whatever the caller's default device is."""
    sent = [torch.rand(2, 5 + i).to(torch.bfloat16) for i in range(count)]
    specs = tuple(TensorSpec(tensor.dtype, tuple(tensor.shape)) for tensor in sent)
    starts, end = offsets(specs)
    payload = bytearray(end)
    for start, tensor in zip(starts, sent, strict=True):
        payload[start : start + tensor.nbytes] = as_bytes(tensor)
    reader = FrameReader(admit=lambda *_: Admitted("found", specs))
    make = checked_wire if checks else wire
    with torch.device("meta"):
        (frame,) = feed(reader, make(5, 1, b"m", bytes(payload)), itertools.repeat(chunk))
    assert isinstance(frame, Frame)
    assert (frame.found, bytes(frame.payload)) == ("found", payload)
    assert len(frame.tensors) == count
    for found, tensor in zip(frame.tensors, sent, strict=True):
        assert torch.equal(found, tensor)
        assert found.data_ptr() % ALIGNMENT == 0
        assert not found._is_view()


def test_limits_are_inclusive() -> None:
    limits = Limits(meta_bytes=10, payload_bytes=20)
    assert whole(FrameReader(limits), wire(5, 1, bytes(10), bytes(20)))
    for bad in (wire(5, 1, bytes(11)), wire(5, 1, b"", bytes(21))):
        with pytest.raises(ProtocolError, match="limit"):
            whole(FrameReader(limits), bad)


def test_a_limit_is_enforced_before_the_bytes_arrive() -> None:
    header = struct.pack("<2sBBIQQ", b"SY", 1, 5, 1 << 31, 1, 0)
    with pytest.raises(ProtocolError, match="meta section"):
        whole(FrameReader(), header)


@pytest.mark.parametrize(
    ("header", "told"),
    [
        (struct.pack("<2sBBIQQ", b"XX", 1, 5, 0, 1, 0), "not this protocol"),
        (struct.pack("<2sBBIQQ", b"SY", 9, 5, 0, 1, 0), "version 9"),
        (struct.pack("<2sBBIQQ", b"SY", 1, 99, 0, 1, 0), "kind of frame: 99"),
        (struct.pack("<2sBBIQQ", b"SY", 1, 0, 0, 1, 0), "kind of frame: 0"),
    ],
)
def test_wrong_headers(header: bytes, told: str) -> None:
    with pytest.raises(ProtocolError, match=told):
        whole(FrameReader(), header)


@given(st.binary(max_size=300), chunkings)
def test_random_bytes_never_raise_anything_else(data: bytes, chunks: Iterable[int]) -> None:
    try:
        feed(FrameReader(), data, chunks)
    except ProtocolError:
        return


@given(frames, chunkings, st.data())
def test_mutated_streams_never_raise_anything_else(
    sent: list[Sent], chunks: Iterable[int], data: st.DataObject
) -> None:
    stream = bytearray(b"".join(wire(*frame) for frame in sent) or b"S")
    for _ in range(data.draw(st.integers(1, 3))):
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = feed(FrameReader(Limits(1000, 1 << 16)), bytes(stream), chunks)
    except ProtocolError:
        return
    assert all(isinstance(frame, Frame) for frame in found)


def refuse_odd(kind: Kind, meta: bytes, payload_bytes: int) -> Admitted:
    if meta.startswith(b"odd"):
        raise InvalidInput("odd")
    return Admitted(payload_bytes)


@given(st.lists(st.tuples(st.booleans(), st.binary(max_size=300)), max_size=8), chunkings)
def test_a_rejected_payload_is_skipped_and_the_next_frame_read(
    wanted: list[tuple[bool, bytes]], chunks: Iterable[int]
) -> None:
    sent = [
        (Kind.EXCHANGE, n, b"odd" if odd else b"even", payload)
        for n, (odd, payload) in enumerate(wanted)
    ]
    reader = FrameReader(admit=refuse_odd)
    found = feed(reader, b"".join(wire(*frame) for frame in sent), chunks)
    assert len(found) == len(sent)
    for frame, (kind, request, meta, payload) in zip(found, sent, strict=True):
        if meta == b"odd":
            assert isinstance(frame, Rejected)
            assert frame.request == request
            assert isinstance(frame.error, InvalidInput)
        else:
            assert plain(frame) == (kind, request, meta, payload)
            assert isinstance(frame, Frame)
            assert frame.found == len(payload)
    assert not reader.mid_frame


def test_nothing_is_allocated_for_a_rejected_payload() -> None:
    """An exabyte would not fit; refusing it must not try."""
    reader = FrameReader(Limits(payload_bytes=1 << 62), refuse_odd)
    header = struct.pack("<2sBBIQQ", b"SY", 1, 5, 3, 7, 1 << 60)
    (rejected,) = whole(reader, header + b"odd")
    assert isinstance(rejected, Rejected)
    assert rejected.request == 7
    assert reader.mid_frame


def test_a_protocol_error_of_admit_ends_the_stream() -> None:
    def admit(kind: Kind, meta: bytes, payload_bytes: int) -> Admitted:
        raise ProtocolError("no")

    with pytest.raises(ProtocolError, match="no"):
        whole(FrameReader(admit=admit), wire(5, 1, b"", b"x"))


def test_mid_frame() -> None:
    stream = wire(5, 1, b"meta", b"payload")
    for length in range(1, len(stream)):
        reader = FrameReader()
        assert whole(reader, stream[:length]) == []
        assert reader.mid_frame
    assert not FrameReader().mid_frame


@pytest.mark.parametrize(
    "meta",
    [
        b"",
        b"{",
        b"[1]",
        b"null",
        b"\xff\xfe\xfa",
        b'{"a": \x80}',
        b"[" * 60_000,
        b'{"a":' * 10_000,
        b"1" * 6000,
    ],
    ids=lambda meta: repr(meta[:8]),
)
def test_meta_that_is_no_json_object(meta: bytes) -> None:
    (frame,) = whole(FrameReader(), wire(1, 0, meta))
    assert isinstance(frame, Frame)
    with pytest.raises(ProtocolError, match="HELLO"):
        frame.json()


@given(st.binary(max_size=200))
def test_random_meta_is_json_or_a_protocol_error(meta: bytes) -> None:
    (frame,) = whole(FrameReader(), wire(3, 0, meta))
    assert isinstance(frame, Frame)
    try:
        assert frame.json() == json.loads(meta)
    except ProtocolError:
        return


def test_json_and_error_frames() -> None:
    stream = json_frame(Kind.REQUEST, 3, {"get": "stats", "why": "ü"}) + error_frame(
        4, ConnectionLost("gone")
    )
    request, error = whole(FrameReader(), stream)
    assert isinstance(request, Frame)
    assert isinstance(error, Frame)
    assert (request.kind, request.request) == (Kind.REQUEST, 3)
    assert request.json() == {"get": "stats", "why": "ü"}
    assert (error.kind, error.request) == (Kind.ERROR, 4)
    assert error.json() == {"code": "connection-lost", "message": "gone"}


# Checksums


def checked_wire(kind: int, request: int, meta: bytes, payload: bytes = b"") -> bytes:
    """A frame with checksums as the protocol describes it, independently of the package."""
    header = struct.pack("<2sBBIQQ", b"SY", 1, kind | 128, len(meta), request, len(payload))
    of_header = xxhash.xxh3_64_intdigest(header)
    of_meta = xxhash.xxh3_64_intdigest(meta, of_header)
    of_payload = xxhash.xxh3_64_intdigest(payload, of_meta)
    sums = [struct.pack("<Q", number) for number in (of_header, of_meta, of_payload)]
    return header + sums[0] + meta + sums[1] + (payload + sums[2] if payload else b"")


@given(frames, chunkings)
def test_frames_with_checksums(sent: list[Sent], chunks: Iterable[int]) -> None:
    reader = FrameReader()
    found = feed(reader, b"".join(checked_wire(*frame) for frame in sent), chunks)
    assert [plain(frame) for frame in found] == sent
    assert not reader.mid_frame
    assert reader.checked is (True if sent else None)


@given(frames, st.integers(0, 4))
def test_what_is_sent_with_checksums(sent: list[Sent], cut: int) -> None:
    """However the payload is divided among buffers."""
    for kind, request, meta, payload in sent:
        parts = [wire(kind, request, meta, payload)[: 24 + len(meta)]]
        parts += [payload[:cut], payload[cut:]]
        assert b"".join(checked(parts)) == checked_wire(kind, request, meta, payload)


@given(frames.filter(bool), chunkings, st.data())
def test_no_damage_passes(sent: list[Sent], chunks: Iterable[int], data: st.DataObject) -> None:
    """Bits flipped, bytes lost or repeated: what comes out is what was sent, up to where it
    stops. (None of the frames is longer than the reader waits for.)"""
    stream = bytearray(b"".join(checked_wire(*frame) for frame in sent))
    at = data.draw(st.integers(0, len(stream) - 1))
    match data.draw(st.sampled_from(["flip", "lose", "repeat", "swap"])):
        case "flip":
            stream[at] ^= 1 << data.draw(st.integers(0, 7))
        case "lose":
            del stream[at : at + data.draw(st.integers(1, 40))]
        case "repeat":
            stream[at:at] = stream[at : at + data.draw(st.integers(1, 40))]
        case "swap":
            stream[at : at + 16] = stream[at : at + 16][::-1]
    found: list[Frame | Rejected] = []

    def record(kind: Kind, meta: bytes, payload_bytes: int) -> Admitted:
        assert (kind, meta) in [(kind, meta) for kind, _, meta, _ in sent]
        return Admitted()

    reader = FrameReader(admit=record, checked=True)
    try:
        for chunk in range(0, len(stream), 7):
            found += feed(reader, bytes(stream[chunk : chunk + 7]), itertools.repeat(7))
    except ProtocolError:
        pass
    whole_frames = [plain(frame) for frame in found]
    assert all(frame in sent for frame in whole_frames)


def test_a_connection_has_checksums_or_has_none() -> None:
    first, second = (Kind.HELLO, 0, b"{}", b""), (Kind.EXCHANGE, 1, b"m", b"payload")
    for make, other in ((wire, checked_wire), (checked_wire, wire)):
        with pytest.raises(ProtocolError, match="checksums on a connection"):
            whole(FrameReader(), make(*first) + other(*second))
    with pytest.raises(ProtocolError, match="checksums on a connection"):
        whole(FrameReader(checked=True), wire(*second))
    (error,) = whole(FrameReader(checked=True), wire(Kind.ERROR, 0, b"{}"))
    assert isinstance(error, Frame)


def test_a_rejected_payload_with_a_checksum_is_skipped() -> None:
    stream = checked_wire(5, 1, b"odd", bytes(100)) + checked_wire(5, 2, b"odd")
    rejected, empty, good = whole(
        FrameReader(admit=refuse_odd), stream + checked_wire(5, 3, b"even", b"xy")
    )
    assert isinstance(rejected, Rejected)
    assert isinstance(empty, Rejected)
    assert plain(good) == (Kind.EXCHANGE, 3, b"even", b"xy")


def test_no_memory_for_a_payload_is_that_frames_failure() -> None:
    """An exabyte that nobody refuses: the frame is, and its payload skipped."""
    reader = FrameReader(Limits(payload_bytes=1 << 62))
    (rejected,) = whole(reader, struct.pack("<2sBBIQQ", b"SY", 1, 5, 0, 7, 1 << 60))
    assert isinstance(rejected, Rejected)
    assert isinstance(rejected.error, ExchangeFailed)
    assert "out of memory" in str(rejected.error)
