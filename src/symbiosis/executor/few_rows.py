"""A kernel for the products of several decoders' rows with one large weight.

MKL's fp32 product takes one to three rows in the time of one, and needs two to three times as long
for four to sixteen. oneDNN's, on the same weight, has no such step; see decision 17.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

Linear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""What `torch.nn.functional.linear` is, and `linear` here."""

_ROWS = range(4, 33)
_LEAST_ELEMENTS = 1 << 21  # of the weight; with smaller ones oneDNN's fixed cost is not repaid


def _has_both() -> bool:
    """Is torch built with both libraries, and oneDNN's product where inductor expects it?"""
    mkl: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    mkldnn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return mkl and mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


_AVAILABLE = _has_both()


def linear(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``F.linear`` of ``x`` (T, I) with ``w`` (O, I), by the faster kernel: (T, O), contiguous.

    For joined rows only: the last bits are not those of `F.linear`.
    """
    few = _AVAILABLE and x.dim() == 2 and x.shape[0] in _ROWS and w.numel() >= _LEAST_ELEMENTS
    if few and x.is_cpu and x.dtype is w.dtype is torch.float32 and w.is_contiguous():
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, w, bias, "none", [], "")
        return y
    return F.linear(x, w, bias)
