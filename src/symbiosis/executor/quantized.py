"""Frozen matrices in eight or four bits, and back.

torchao quantises and defines the numbers that are stored; here they are unpacked to the dense
matrix that every operation then works on. Forward and input gradient therefore see the very same
matrix, and a client sees an ordinary model with those numbers for weights. Knows matrices; knows
nothing of models and operations.

``int8``: one byte for each number, symmetric, one scale for each output feature.
``nf4``: half a byte, the 4-bit NormalFloat of QLoRA (Dettmers et al., arXiv 2305.14314) in blocks
of 64, their scales in eight bits.
"""

from __future__ import annotations

import logging
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from symbiosis.errors import ModelError

Scheme = Literal["int8", "nf4"]

_BLOCK = 64  # numbers of an nf4 block
_SCALES = 256  # of nf4, at most so many in a block of their own
_WORST = {"int8": 0.1, "nf4": 0.3}
"""A relative error (Frobenius) beyond this says that a matrix is not one for the scheme; of
Gaussian numbers the errors are 0.008 and 0.09."""

_PAIRS = {torch.float32: torch.int64, torch.bfloat16: torch.int32, torch.float16: torch.int32}
"""By dtype: an integer as wide as two numbers, to look both halves of a byte up at once."""


class QuantizedMatrix(Protocol):
    """What is kept of a matrix."""

    device: torch.device

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""

    def unpack(self, out: Tensor) -> Tensor:
        """Write the matrix into ``out``, contiguous, of its shape and dtype; returns that."""


class Int8Matrix:
    """See the module; the scales run along ``output_dim``."""

    def __init__(self, matrix: Tensor, output_dim: int) -> None:
        torchao = _torchao()
        made = torchao.Int8Tensor.from_hp(matrix, torchao.PerRow(1 - output_dim))
        self._numbers: Tensor = made.qdata
        self._scales: Tensor = made.scale
        self.device = matrix.device

    @property
    def num_bytes(self) -> int:
        return self._numbers.nbytes + self._scales.nbytes

    def unpack(self, out: Tensor) -> Tensor:
        return out.copy_(self._numbers).mul_(self._scales)


class Nf4Matrix:
    """See the module. torchao unpacks through 64-bit indices, eight times slower than this; the
    numbers are the same."""

    def __init__(self, matrix: Tensor) -> None:
        blocks = matrix.numel() // _BLOCK
        scales = next(size for size in range(_SCALES, 0, -1) if blocks % size == 0)
        self._kept: Any = _torchao().to_nf4(matrix, _BLOCK, scales)
        self.device = matrix.device
        code: Tensor = self._kept.nf4
        pairs = torch.stack([code.repeat_interleave(16), code.repeat(16)], 1)
        self._pairs = pairs.view(_PAIRS[matrix.dtype]).flatten()  # by byte: high half, low half

    @property
    def num_bytes(self) -> int:
        kept = self._kept
        parts = (kept.quantized_data, kept.quantized_scalers, kept.quantization_factor)
        return sum(part.nbytes for part in parts)

    def unpack(self, out: Tensor) -> Tensor:
        kept = self._kept
        scales: Tensor = kept.dequantize_scalers(
            kept.quantized_scalers, kept.quantization_factor, kept.scaler_block_size
        )
        pairs = out.view(-1).view(self._pairs.dtype)
        torch.index_select(self._pairs, 0, kept.quantized_data.int(), out=pairs)
        out.view(-1, _BLOCK).mul_(scales.unsqueeze(-1))
        return out


def quantize(matrix: Tensor, scheme: Scheme, output_dim: int) -> QuantizedMatrix | None:
    """``matrix`` (two-dimensional, contiguous) in few bits; None if it cannot be, or not well.

    Raises ModelError if torchao is missing.
    """
    if matrix.dtype not in _PAIRS or (scheme == "nf4" and matrix.numel() % _BLOCK):
        return None
    made: QuantizedMatrix = (
        Int8Matrix(matrix, output_dim) if scheme == "int8" else Nf4Matrix(matrix)
    )
    unpacked = made.unpack(torch.empty_like(matrix))
    error = (unpacked.float() - matrix.float()).norm() / matrix.float().norm()
    return made if error < _WORST[scheme] else None  # not for NaN either


def check(scheme: Scheme) -> None:
    """Find out before minutes are spent on loading. Raises ModelError."""
    if scheme not in _WORST:
        raise ModelError(f"there is no quantisation {scheme!r}; use {' or '.join(_WORST)}")
    _torchao()


def _torchao() -> Any:
    logging.getLogger("torchao").setLevel(logging.ERROR)  # of extensions for other machines
    try:
        from torchao import quantization  # type: ignore[import-untyped,import-not-found,unused-ignore]

        if not hasattr(quantization, "Int8Tensor") or not hasattr(quantization, "to_nf4"):
            raise ImportError("this one is older")
    except ImportError as error:
        raise ModelError(
            f"a quantised base needs torchao 0.18 or later ({error}): pip install -U torchao"
        ) from None
    return quantization
