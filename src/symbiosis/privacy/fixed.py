"""Activations as integers: a scale for each token, so small that no product can wrap around.

By Cauchy and Schwarz ``|⟨w, x⟩| <= ‖w‖₂ ‖x‖₂`` for every row w of a weight, so the largest row norm
and the token's own norm bound every output; the scale makes that bound the ring's limit. The scale
stays with the client. Knows numbers; knows nothing of masks.

Shapes: T rows, I in, O out.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from symbiosis.privacy.ring import LIMIT

_MARGIN = 1e-9
"""Relative; for the rounding of fp64 in norms and scales, which is below 1e-10 up to I = 2^20."""


_SHORTEST = 1e-100
"""A row's norm, below which it counts as zero; no fp32 but 0 is that small."""


class Fixed(NamedTuple):
    """``residues * steps`` are the rows."""

    residues: Tensor  # (T, I) int32 or int64
    steps: Tensor  # (T, 1) float64; NaN for a row that is not finite


def to_fixed(x: Tensor, norm: float, bits: int) -> Fixed:
    """``x`` (T, I), any float dtype, for weights whose rows have norms up to ``norm``.

    Whatever the rows hold, no product with such a weight exceeds the ring's limit.
    """
    rows = x.double()
    lengths = rows.norm(dim=1, keepdim=True)
    rounding = norm * math.sqrt(x.shape[1]) / 2  # each number moves by half a step at most
    room = (LIMIT[bits] - rounding) * (1 - _MARGIN)
    if room <= 0:
        raise ValueError(f"{x.shape[1]} inputs are too many for the ring")
    steps = lengths * (norm / room)
    # A row of zeros is zeros at any step; so is one whose squares fp64 cannot hold.
    fit = torch.isfinite(steps) & (lengths > _SHORTEST) & (steps > 0)
    numbers = torch.where(fit, rows / torch.where(fit, steps, 1.0), 0.0).round_()
    steps = torch.where(torch.isfinite(lengths), steps, math.nan)
    return Fixed(numbers.to(torch.int32 if bits == 8 else torch.int64), steps)


def from_fixed(product: Tensor, steps: Tensor) -> Tensor:
    """A product's residues (T, O) as numbers (T, O), float64."""
    return product.double().mul_(steps)
