"""Exchanges and results as bytes; whatever is malformed is a ProtocolError."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from symbiosis.errors import ProtocolError, UnknownOperation
from symbiosis.wire.exchange import (
    Exchange,
    Op,
    Priority,
    Result,
    pack_exchange,
    pack_result,
    unpack_exchange,
    unpack_result,
)
from symbiosis.wire.tensors import ITEM_BYTES, TensorSpec, spec_of

ids = st.integers(0, 0xFFFFFFFF)
numbers = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=9).map(tuple)
specs = st.lists(
    st.builds(
        TensorSpec,
        st.sampled_from(list(ITEM_BYTES)),
        st.lists(ids, max_size=8).map(tuple),
    ),
    max_size=3,
).map(tuple)


@st.composite
def exchanges(draw: st.DrawFn) -> Exchange:
    pairs = draw(st.lists(st.tuples(ids, ids), min_size=1, max_size=6))
    weights, biases = zip(*pairs, strict=True)
    return Exchange(
        draw(st.sampled_from(Op)),
        weights,
        biases,
        draw(numbers),
        draw(numbers),
        draw(specs),
        (),
        draw(st.sampled_from(Priority)),
    )


@given(exchanges())
def test_an_exchange_survives_the_wire(exchange: Exchange) -> None:
    assert unpack_exchange(pack_exchange(exchange)) == exchange


@given(exchanges(), st.binary(min_size=1, max_size=8))
def test_truncated_and_trailing_bytes_are_noticed(exchange: Exchange, extra: bytes) -> None:
    packed = pack_exchange(exchange)
    for length in range(0, len(packed), max(1, len(packed) // 20)):
        with pytest.raises(ProtocolError):
            unpack_exchange(packed[:length])
    with pytest.raises(ProtocolError):
        unpack_exchange(packed + extra)


@given(st.binary(max_size=120))
def test_random_bytes_never_raise_anything_else(data: bytes) -> None:
    check_only_wire_errors(data)


@given(exchanges(), st.data())
def test_mutated_exchanges_never_raise_anything_else(
    exchange: Exchange, data: st.DataObject
) -> None:
    packed = bytearray(pack_exchange(exchange))
    for _ in range(data.draw(st.integers(1, 4))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    check_only_wire_errors(bytes(packed))


def check_only_wire_errors(data: bytes) -> None:
    try:
        exchange = unpack_exchange(data)
    except (ProtocolError, UnknownOperation):
        return
    assert pack_exchange(exchange) == data


def test_the_meta_section_byte_for_byte() -> None:
    exchange = Exchange(
        Op.LINEAR,
        (7, 8),
        (0, 3),
        (1, 2, 0, 1),
        (-5,),
        (TensorSpec(torch.float32, (2, 3)),),
        (),
        Priority.TRAINING,
    )
    assert pack_exchange(exchange) == struct.pack(
        "<BBBBH4I5qBBB2I", 1, 1, 2, 4, 1, 7, 8, 0, 3, 1, 2, 0, 1, -5, 1, 1, 2, 2, 3
    )


@pytest.mark.parametrize("op", [0, 13, 99, 255])
def test_an_operation_outside_the_list_is_told_by_its_number(op: int) -> None:
    meta = struct.pack("<BBBBHIIB", op, 0, 1, 0, 0, 1, 0, 0)
    with pytest.raises(UnknownOperation, match=f"operation {op} .*linear"):
        unpack_exchange(meta)


@pytest.mark.parametrize(
    "meta",
    [
        struct.pack("<BBBBHB", 1, 0, 0, 0, 0, 0),  # no weight
        struct.pack("<BBBBHIIB", 1, 2, 1, 0, 0, 1, 0, 0),  # a priority that does not exist
        struct.pack("<BBBBHIIB", 1, 0, 1, 255, 255, 1, 0, 0),  # promises a long recipe
        b"",
    ],
)
def test_malformed_meta_sections(meta: bytes) -> None:
    with pytest.raises(ProtocolError):
        unpack_exchange(meta)


@given(st.integers(0, 2**40), st.integers(0, 2**40), st.integers(0, 2**20), st.data())
def test_a_result_survives_the_wire(
    queue_us: int, compute_us: int, batch_size: int, data: st.DataObject
) -> None:
    shapes = data.draw(st.lists(st.lists(st.integers(0, 3), max_size=3), max_size=3))
    tensors = tuple(torch.zeros(shape) for shape in shapes)
    shared = data.draw(st.booleans())
    result = Result(tensors, queue_us, compute_us, batch_size, shared)
    meta = pack_result(result, tuple(map(spec_of, tensors)))
    found, found_specs = unpack_result(meta)
    assert found_specs == tuple(spec_of(tensor) for tensor in tensors)
    assert found == (
        (),
        min(queue_us, 0xFFFFFFFF),
        min(compute_us, 0xFFFFFFFF),
        min(batch_size, 0xFFFF),
        shared,
    )


@given(st.binary(max_size=60))
def test_random_results_are_results_or_protocol_errors(data: bytes) -> None:
    try:
        unpack_result(data)
    except ProtocolError:
        return


def test_truncated_and_trailing_results_are_noticed() -> None:
    tensors = (torch.zeros(2, 3),)
    meta = pack_result(Result(tensors, 1, 2, 3), tuple(map(spec_of, tensors)))
    for bad in (*(meta[:length] for length in range(len(meta))), meta + b"\0"):
        with pytest.raises(ProtocolError):
            unpack_result(bad)
