"""Specs and payloads: round trips, alignment, malformed descriptions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from symbiosis.errors import ProtocolError
from symbiosis.wire.tensors import (
    ALIGNMENT,
    ITEM_BYTES,
    MAX_DIMS,
    TensorSpec,
    as_bytes,
    empty_payload,
    from_payload,
    offsets,
    pack_specs,
    spec_of,
    unpack_specs,
)

DTYPES = list(ITEM_BYTES)


def specs_with(max_dim: int) -> st.SearchStrategy[tuple[TensorSpec, ...]]:
    shape = st.lists(st.integers(0, max_dim), max_size=MAX_DIMS).map(tuple)
    return st.lists(st.builds(TensorSpec, st.sampled_from(DTYPES), shape), max_size=5).map(tuple)


@given(specs_with(0xFFFFFFFF), st.binary(max_size=9), st.binary(max_size=9))
def test_specs_survive_the_wire(specs: tuple[TensorSpec, ...], before: bytes, after: bytes) -> None:
    packed = pack_specs(specs)
    found, at = unpack_specs(before + packed + after, len(before))
    assert found == specs
    assert at == len(before) + len(packed)


@given(specs_with(0xFFFFFFFF))
def test_every_truncation_is_noticed(specs: tuple[TensorSpec, ...]) -> None:
    packed = pack_specs(specs)
    for length in range(len(packed)):
        with pytest.raises(ProtocolError):
            unpack_specs(packed[:length], 0)


@given(st.binary(max_size=80))
def test_random_bytes_are_specs_or_a_protocol_error(data: bytes) -> None:
    try:
        specs, at = unpack_specs(data, 0)
    except ProtocolError:
        return
    assert pack_specs(specs) == data[:at]


@pytest.mark.parametrize("data", [b"\1\0\0", b"\1\x0b\0", b"\1\xff\0", b"\1\1\x09" + bytes(36)])
def test_unknown_dtypes_and_too_many_dimensions_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        unpack_specs(data, 0)


def test_what_cannot_travel_is_refused_by_the_sender() -> None:
    with pytest.raises(ProtocolError, match="complex64"):
        spec_of(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ProtocolError, match="9 dimensions"):
        pack_specs((spec_of(torch.zeros((1,) * 9)),))


@given(specs_with(20))
def test_tensors_are_aligned_and_do_not_overlap(specs: tuple[TensorSpec, ...]) -> None:
    starts, end = offsets(specs)
    last = 0
    for start, spec in zip(starts, specs, strict=True):
        assert start % ALIGNMENT == 0
        assert start >= last
        last = start + spec.num_bytes
    assert end == last


small = st.lists(
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=4)),
    min_size=1,
    max_size=4,
)


@given(small)
def test_tensors_survive_a_payload(wanted: list[tuple[torch.dtype, list[int]]]) -> None:
    tensors = [torch.randint(0, 2, shape).to(dtype) for dtype, shape in wanted]
    specs = tuple(spec_of(tensor) for tensor in tensors)
    starts, end = offsets(specs)
    payload = empty_payload(end)
    for start, tensor in zip(starts, tensors, strict=True):
        if not (body := as_bytes(tensor)):
            continue
        as_bytes(payload)[start : start + len(body)] = body
    for found, tensor in zip(from_payload(payload, specs), tensors, strict=True):
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)
        assert found.is_contiguous()


def test_payload_tensors_are_aligned_in_memory_and_no_views() -> None:
    specs = tuple(TensorSpec(dtype, (3,)) for dtype in DTYPES)
    payload = empty_payload(offsets(specs)[1])
    for tensor in from_payload(payload, specs):
        assert tensor.data_ptr() % ALIGNMENT == 0
        assert not tensor._is_view()


def test_bytes_of_a_tensor_are_not_a_copy() -> None:
    tensor = torch.arange(6, dtype=torch.bfloat16).view(2, 3)
    as_bytes(tensor)[:2] = b"\x80\x3f"  # bfloat16 1.0, little-endian
    assert tensor[0, 0] == 1.0
