"""The ring: frozen weights as small integers, products exact modulo 2^32 or 2^48.

One function, `ring_product`, is used by the executor, by a helper and by a client, and must give
the same bytes everywhere: it is exact, so any faster route through it is a matter of speed alone.
Knows integers; knows nothing of masks, activations or the wire's frames.

Shapes: T rows, I in, O out. Two rings:

======  ===========  =======================  =================================
bits    weights      residues, in memory      on the wire
======  ===========  =======================  =================================
8       int8         int32, modulo 2^32       int32 (T, I)
16      int16        int64, modulo 2^48,      int16 (T, I, 3): six bytes each,
                     in [-2^47, 2^47)         low word first, no padding
======  ===========  =======================  =================================
"""

from __future__ import annotations

import functools
import hashlib
import struct
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from symbiosis.privacy import digits

LIMIT = {8: (1 << 31) - 1, 16: (1 << 47) - 1}
"""By the weights' bits: what the magnitude of a product must not exceed, lest it wrap around."""

WORDS = 3  # of 16 bits, in a residue modulo 2^48
RESIDUE_BYTES = {8: 4, 16: 2 * WORDS}  # as they travel, by the bits of the weights
_LARGEST = {8: 127, 16: 32767}
_WEIGHTS: dict[int, torch.dtype] = {8: torch.int8, 16: torch.int16}
_RESIDUES = {torch.int8: torch.int32, torch.int16: torch.int64}
_EXACT_WIDTH = 1 << 15  # 2^7 · 2^31 · 2^15 and 2^15 · 2^23 · 2^15 are 2^53: fp64 is exact
_BLOCK_ELEMENTS = 1 << 22  # of a weight, turned to fp64 at a time
_BLOCK_RESIDUES = 1 << 20  # of input or result; what lies between takes up to 100 bytes for each


class RingWeight(NamedTuple):
    """A frozen matrix as integers: ``numbers`` times the ``scales`` of its outputs."""

    numbers: Tensor  # (A, B), int8 or int16, contiguous, as the weight is stored
    scales: Tensor  # float32, one for each index along `axis`
    axis: int  # where the layer's outputs lie: 0 for a linear layer, 1 for a Conv1D
    norms: tuple[float, float]  # largest ‖·‖₂ of a row, and of a column

    @property
    def bits(self) -> int:
        return 8 if self.numbers.dtype is torch.int8 else 16

    def digest(self) -> str:
        """SHA-256 of everything in it: equal digests, equal answers."""
        head = struct.pack("<BBQQ", self.bits, self.axis, *self.numbers.shape)
        found = hashlib.sha256(head)
        for tensor in (self.numbers, self.scales):
            found.update(tensor.contiguous().view(torch.uint8).numpy().data)
        return found.hexdigest()


def quantise(matrix: Tensor, axis: int, bits: int) -> RingWeight:
    """``matrix`` (A, B), of any float dtype, as integers with a scale for each output.

    Symmetric, rounded half to even, from fp32 by IEEE operations alone, so that whoever holds the
    same numbers gets the same integers. Raises ValueError for a matrix that is not finite.
    """
    m = matrix.detach().cpu().float()
    largest = m.abs().amax(1 - axis, keepdim=True) if m.numel() else m.new_ones(1, 1)
    if not torch.isfinite(largest).all():
        raise ValueError("it holds infinities or NaN")
    scales = largest / _LARGEST[bits]
    # A row of zeros, or so small that its scale would be denormal and its quotients overflow.
    scales = torch.where(scales < torch.finfo(torch.float32).tiny, 1.0, scales)
    numbers = (m / scales).round_().clamp_(-_LARGEST[bits], _LARGEST[bits]).to(_WEIGHTS[bits])
    return RingWeight(numbers.contiguous(), scales.flatten(), axis, _norms(numbers))


def _norms(numbers: Tensor) -> tuple[float, float]:
    """Exact up to the last square root: sums of squares stay below 2^53."""
    squares = numbers.double().square_()
    return tuple(float(squares.sum(d).max().sqrt()) if squares.numel() else 0.0 for d in (1, 0))  # type: ignore[return-value]


def ring_product(w_q: Tensor, u: Tensor) -> Tensor:
    """``u w_qᵀ`` in the ring: (T, O), exact, with the dtype of ``u``.

    ``w_q`` is (O, I), int8 or int16, contiguous or the transpose of a contiguous matrix; ``u`` is
    (T, I), int32 for int8 (modulo 2^32), int64 for int16 (modulo 2^48, any representatives).
    Any thread. Raises ValueError for other dtypes.
    """
    if _RESIDUES.get(w_q.dtype) is not u.dtype:
        raise ValueError(f"no ring has weights of {w_q.dtype} and residues of {u.dtype}")
    if w_q.shape[1] <= digits.MAX_WIDTH[w_q.dtype] and _digits_win():
        return by_digits(w_q, u)
    return by_float64(w_q, u)


def by_rows(rows: int, widest: int, compute: Callable[[int, int], list[Tensor]]) -> list[Tensor]:
    """What ``compute(0, rows)`` returns, asked for in blocks of rows: so that what lies between
    inputs and results takes about 120 MB at most, however many rows there are. ``widest`` is the
    most residues of a row, in or out."""
    step = max(1, _BLOCK_RESIDUES // max(1, widest))
    if rows <= step:
        return compute(0, rows)
    results: list[Tensor] = []
    for start in range(0, rows, step):
        parts = compute(start, min(rows, start + step))
        results = results or [part.new_empty(rows, *part.shape[1:]) for part in parts]
        for result, part in zip(results, parts, strict=True):
            result[start : start + len(part)] = part
    return results


def by_digits(w_q: Tensor, u: Tensor) -> Tensor:
    """`ring_product` by products of int8; wants `digits.exact()`, and I up to `MAX_WIDTH`."""
    if w_q.dtype is torch.int8:
        return digits.product_32(w_q, u)
    return centred(digits.product_48(w_q, u))


def by_float64(w_q: Tensor, u: Tensor) -> Tensor:
    """`ring_product` by products of fp64, which are exact on any machine."""
    if w_q.dtype is torch.int8:
        return _exact(w_q, u.double()).to(torch.int32)
    high, low = _halves(u)
    product = _exact(w_q, low.double())
    return centred(product.add_(_exact(w_q, high.double()), alpha=1 << 24))


@functools.cache
def _digits_win() -> bool:
    """Whether int8 products are exact here, and quicker: without an instruction for them they
    are not. Decides speed alone, so a wrong measurement does no harm. Takes milliseconds, once."""
    if not digits.exact():
        return False
    w_q, u = torch.ones(256, 512, dtype=torch.int8), torch.ones(32, 512, dtype=torch.int32)
    return _best_s(by_digits, w_q, u) < _best_s(by_float64, w_q, u)


def _best_s(route: Callable[[Tensor, Tensor], Tensor], w_q: Tensor, u: Tensor) -> float:
    """Seconds of the quickest of a few runs."""
    taken_s = []
    for _ in range(4):
        started_s = time.perf_counter()
        route(w_q, u)
        taken_s.append(time.perf_counter() - started_s)
    return min(taken_s)


def _exact(w_q: Tensor, u: Tensor) -> Tensor:
    """The product (T, O) as int64, modulo 2^64; ``u`` holds integers of at most 2^31 (int8) or
    2^23 (int16) in magnitude, so that every partial sum is exact in fp64."""
    outputs, width = w_q.shape
    y = torch.zeros(u.shape[0], outputs, dtype=torch.int64)
    inner = min(width, _EXACT_WIDTH) or 1
    outer = max(1, _BLOCK_ELEMENTS // inner)
    for i in range(0, width, inner):
        part = u[:, i : i + inner]
        for o in range(0, outputs, outer):
            block = w_q[o : o + outer, i : i + inner].double()
            y[:, o : o + outer] += (part @ block.t()).to(torch.int64)
    return y


def _halves(u: Tensor) -> tuple[Tensor, Tensor]:
    """(high, low) with ``high · 2^24 + low = u`` modulo 2^48, both in [-2^23, 2^23)."""
    half, mask = 1 << 23, (1 << 24) - 1
    low = ((u + half) & mask) - half
    high = ((((u - low) >> 24) + half) & mask) - half
    return high, low


def centred(u: Tensor) -> Tensor:
    """Residues modulo 2^48 as int64 in [-2^47, 2^47); in place."""
    half = 1 << 47
    return u.add_(half).bitwise_and_((1 << 48) - 1).sub_(half)


def to_wire(u: Tensor) -> Tensor:
    """Residues (T, I) as they travel; see the module."""
    if u.dtype is torch.int32:
        return u
    return u.contiguous().view(torch.int16).view(*u.shape, 4)[..., :WORDS].contiguous()


def from_wire(words: Tensor) -> Tensor:
    """Inverse of `to_wire`."""
    if words.dtype is torch.int32:
        return words
    padded = torch.empty(*words.shape[:-1], 4, dtype=torch.int16)
    padded[..., :WORDS] = words
    padded[..., WORDS] = words[..., -1] >> 15  # the sign
    return padded.view(torch.int64).squeeze(-1)
