"""The ring product on hardware for integers of eight bits, exact modulo 2^32 or 2^48.

A residue u is a sum of signed bytes, its *digits*: u = Σ dₖ·2^(8k) with −128 ≤ dₖ ≤ 127. So
W u = Σ (W dₖ)·2^(8k): all digits are stacked as rows of one product of int8 matrices, which
int8 instructions sum up in int32 without rounding, and what is left are sums that wrap around.
An int16 weight takes part as the bytes it consists of, 256·h + (l + 128), h and l signed.

Whether this machine's int8 product is exact is tried out, not presumed: instructions older than
VNNI may saturate. Letters: T rows, I and O the weight's input and output width, K digits. Knows
nothing of masks and scales.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

MAX_WIDTH = {torch.int8: (1 << 17) - 1, torch.int16: (1 << 16) - 1}
"""By the weight's dtype: inputs for which no sum of products of two bytes can leave int32."""

_FLIP_32 = -0x7F7F7F80  # 0x80808080 as an int32
_FLIP_48 = 0x808080808080
_SMALL = 1 << 16
"""Numbers up to which fewer calls count for more than fewer bytes."""


def product_32(w: Tensor, u: Tensor) -> Tensor:
    """u wᵀ modulo 2^32: int8 (O, I), int32 (T, I) → int32 (T, O); strides may be any."""
    sums = _multiply(_digits(u, _FLIP_32, 4), w)
    total = torch.add(sums[2], sums[3], alpha=256)  # int32 wraps around
    total = torch.add(sums[1], total, alpha=256)
    return torch.add(sums[0], total, alpha=256)


def product_48(w: Tensor, u: Tensor) -> Tensor:
    """u wᵀ: int16 (O, I), int64 (T, I) → int64 (T, O), of which the lowest 48 bits are right.

    ``w`` is contiguous, or the transpose of a contiguous matrix.
    """
    total = torch.zeros(len(u), len(w), dtype=torch.int64)
    if w.is_contiguous():  # its bytes alternate along I, so l and h meet digits side by side
        for sums in reversed(_multiply(_digit_pairs(u), _bytes(w)).unbind()):
            torch.add(sums.to(torch.int64), total, alpha=256, out=total)
    else:  # along O: the sums of l and of h come side by side
        for sums in reversed(_multiply(_digits(u, _FLIP_48, 6), _bytes(w.t()).t()).unbind()):
            low, high = sums.view(len(u), len(w), 2).to(torch.int64).unbind(2)
            torch.add(torch.add(low, high, alpha=256), total, alpha=256, out=total)
    return total.add_(u.sum(1, keepdim=True), alpha=128)


@functools.cache
def exact() -> bool:
    """Whether this machine multiplies int8 matrices, and every bit is right at the extremes."""
    values = torch.tensor([-128, 127, -1, 1, 0], dtype=torch.int8)
    extreme = values.view(5, 1).expand(5, 131)
    mixed = values.repeat(131).view(5, 131)
    a, b = torch.cat([extreme, mixed]), torch.cat([extreme, mixed.roll(2, 1)])
    try:
        found = _multiply(a[None], b)[0]
    except RuntimeError:  # no such kernel in this build
        return False
    return torch.equal(found, (a.long() @ b.long().T).int())


def _bytes(w: Tensor) -> Tensor:
    """int16 (A, B), contiguous → int8 (A, 2B): l, h, l, h, …, for w = 256·h + l + 128."""
    flipped = torch.empty(w.shape, dtype=torch.int16)  # dense, whatever the strides of w
    return torch.bitwise_xor(w, 0x80, out=flipped).view(torch.int8)


def _digits(u: Tensor, flip: int, count: int) -> Tensor:
    """int8 (K, T, I) of (T, I), the lowest digit first."""
    carried = (u + flip).bitwise_xor_(flip)  # each of its bytes, read as signed, is a digit
    if u.numel() <= _SMALL:
        shifts = torch.arange(0, 8 * count, 8, dtype=u.dtype).view(-1, 1, 1)
        return torch.bitwise_right_shift(carried, shifts).to(torch.int8)
    digits = torch.empty(count, *u.shape, dtype=torch.int8)
    for digit in digits:
        digit.copy_(carried)  # wraps
        carried.bitwise_right_shift_(8)
    return digits


def _digit_pairs(u: Tensor) -> Tensor:
    """int8 (6, T, 2I) of (T, I): digit k beside digit k − 1, which counts 256 less."""
    carried = (u + _FLIP_48).bitwise_xor_(_FLIP_48).bitwise_left_shift_(8).contiguous()
    reversed_ = torch.from_numpy(carried.numpy().byteswap())  # 0, d₀, … d₅: the highest byte first
    pairs = torch.empty(6, *u.shape, dtype=torch.int16)
    for pair in reversed(pairs.unbind()):
        pair.copy_(reversed_.bitwise_right_shift_(8))  # wraps
    return pairs.view(torch.int8)


def _multiply(digits: Tensor, w: Tensor) -> Tensor:
    """int8 (K, T, I) and (O, I) → int32 (K, T, O)."""
    count, rows, width = digits.shape
    if not (rows and width and len(w)):
        return digits.new_zeros((count, rows, len(w)), dtype=torch.int32)
    stacked = digits.reshape(count * rows, width)
    if width == 1:  # torch 2.13 takes the strides of such a column for those of a row
        return torch.outer(stacked[:, 0].int(), w[:, 0].int()).view(count, rows, len(w))
    return torch._int_mm(stacked, w.t()).view(count, rows, len(w))
