"""Tensors as bytes: what a tensor is called on the wire and where its bytes lie.

Knows dtypes, shapes and alignment. Knows nothing of frames, operations or weights.
"""

from __future__ import annotations

import functools
import math
import struct
from typing import NamedTuple

import torch

from symbiosis.errors import ProtocolError

ALIGNMENT = 64
"""Every tensor starts at a multiple of 64 bytes from the start of its payload, the alignment of
torch's own allocator, so that a kernel sees the alignment it would see in one process."""

MAX_DIMS = 8
MOST_IN_DIM = 0xFFFFFFFF

_CPU = torch.device("cpu")
"""Said aloud, for the caller may have set another default."""

_CODES: dict[torch.dtype, int] = {
    torch.float32: 1,
    torch.float16: 2,
    torch.bfloat16: 3,
    torch.float64: 4,
    torch.int32: 5,
    torch.int64: 6,
    torch.uint8: 7,
    torch.int8: 8,
    torch.bool: 9,
    torch.int16: 10,
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
ITEM_BYTES = {dtype: torch.empty(0, dtype=dtype).element_size() for dtype in _CODES}


class TensorSpec(NamedTuple):
    """A tensor without its bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    """The spec of ``tensor``; raises ProtocolError for a dtype the wire has no code for."""
    if tensor.dtype not in _CODES:
        known = ", ".join(str(dtype) for dtype in _CODES)
        raise ProtocolError(f"dtype {tensor.dtype} cannot travel; use one of {known}")
    return TensorSpec(tensor.dtype, tuple(tensor.shape))


@functools.lru_cache(maxsize=4096)
def pack_specs(specs: tuple[TensorSpec, ...]) -> bytes:
    """``count u8``, then for each tensor ``dtype u8 | ndim u8 | ndim × dim u32``."""
    parts = [bytes((len(specs),))]
    for dtype, shape in specs:
        if len(shape) > MAX_DIMS:
            raise ProtocolError(f"{len(shape)} dimensions cannot travel; {MAX_DIMS} at most")
        parts.append(struct.pack(f"<BB{len(shape)}I", _CODES[dtype], len(shape), *shape))
    return b"".join(parts)


def unpack_specs(data: memoryview | bytes, at: int) -> tuple[tuple[TensorSpec, ...], int]:
    """Inverse of `pack_specs` from offset ``at``; also the offset behind it.

    Raises ProtocolError on a truncated description, an unknown dtype or too many dimensions.
    """
    try:
        count = data[at]
        at += 1
        specs = []
        for _ in range(count):
            code, ndim = data[at], data[at + 1]
            if ndim > MAX_DIMS:
                raise ProtocolError(f"a tensor of {ndim} dimensions; {MAX_DIMS} at most")
            shape = struct.unpack_from(f"<{ndim}I", data, at + 2)
            specs.append(TensorSpec(_DTYPES[code], shape))
            at += 2 + 4 * ndim
    except (IndexError, struct.error):
        raise ProtocolError("a tensor description is cut short") from None
    except KeyError as unknown:
        raise ProtocolError(f"unknown dtype code {unknown.args[0]}") from None
    return tuple(specs), at


def offsets(specs: tuple[TensorSpec, ...]) -> tuple[list[int], int]:
    """Byte offset of each tensor within one payload, and the payload's length."""
    starts, end = [], 0
    for spec in specs:
        start = -(-end // ALIGNMENT) * ALIGNMENT
        starts.append(start)
        end = start + spec.num_bytes
    return starts, end


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy; the view keeps them alive."""
    if tensor.numel() == 0:
        return memoryview(b"")
    if tensor.dtype is torch.bfloat16:  # numpy has none
        tensor = tensor.view(torch.int16)
    return tensor.numpy().data.cast("B")


def empty_payload(num_bytes: int) -> torch.Tensor:
    """An uninitialised uint8 buffer of ``num_bytes``, aligned to `ALIGNMENT` by torch."""
    return torch.empty(num_bytes, dtype=torch.uint8, device=_CPU)


def allocate(
    specs: tuple[TensorSpec, ...], num_bytes: int
) -> tuple[tuple[torch.Tensor, ...], memoryview]:
    """Uninitialised tensors as they lie in a payload of ``num_bytes``, and that payload's bytes.

    A single one is made as what it is, and for none torch is not called: between two exchanges its
    code and data leave the caches, and each call of it is dear (decision 7).
    """
    if not specs:
        return (), memoryview(b"")
    if len(specs) == 1:
        dtype, shape = specs[0]
        tensor = torch.empty(shape, dtype=dtype, device=_CPU)
        return (tensor,), as_bytes(tensor)
    payload = empty_payload(num_bytes)
    return from_payload(payload, specs), as_bytes(payload)


def unviewed(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor that autograd does not take for a view of another one."""
    if not tensor._is_view():
        return tensor
    fresh = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    shape, strides = tensor.shape, tensor.stride()
    return fresh.set_(tensor.untyped_storage(), tensor.storage_offset(), shape, strides)


def in_storage(storage: torch.UntypedStorage, start: int, spec: TensorSpec) -> torch.Tensor:
    """A tensor in that memory, from byte ``start`` on, which autograd does not take for a view."""
    at = start // ITEM_BYTES[spec.dtype]
    return torch.empty(0, dtype=spec.dtype, device=storage.device).set_(storage, at, spec.shape)  # type: ignore[call-overload,no-any-return]


def from_payload(payload: torch.Tensor, specs: tuple[TensorSpec, ...]) -> tuple[torch.Tensor, ...]:
    """The tensors that lie in ``payload`` (uint8).

    They share its storage but are not views of it for autograd: models may change them in place.
    """
    storage = payload.untyped_storage()
    starts, _ = offsets(specs)
    return tuple(
        in_storage(storage, start, spec) for start, spec in zip(starts, specs, strict=True)
    )
