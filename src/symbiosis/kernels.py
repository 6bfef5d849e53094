"""The kernel that computes a product of fp32 rows on the CPU: torch's own, or oneDNN's.

torch's is MKL's there. oneDNN's, on the same weight as it lies, may be several times as fast, most
of all with few rows, or slower; that depends on the processor, so it is measured on the model's own
matrices when an executor starts. Its last bits are others: rows of several clients, which have
others anyway when they are joined, take the faster one, and rows of one client torch's, unless
whoever runs the executor prefers speed; clients that compute with lent weights follow it. See
decision 17.

Shapes: T rows, I in, O out.
"""

from __future__ import annotations

import bisect
import enum
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

KernelChoice = Literal["exact", "fastest"]
"""Of a lone client's products: the plain model's bits, or the least time."""

Multiply = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""``x``, ``w`` and a bias or none → their product."""

ROWS = (1, 2, 4, 16, 64, 256)
"""Each is measured for as many rows and more, up to the next."""

LEAST_NUMBERS = 1 << 16
"""Of a weight; with smaller ones no kernel matters."""

_LARGE_NUMBERS = 1 << 21
"""From here on kernels are told apart by more than their fixed cost, so both kinds are measured."""

MANY_ROWS = 64
"""From here on arithmetic counts, and not where weights come from."""


class Product(enum.StrEnum):
    """Which of a weight's dimensions is multiplied."""

    LINEAR = enum.auto()  # x (..., I), W (O, I) → x Wᵀ (..., O)
    MATMUL = enum.auto()  # x (..., I), W (I, O) → x W (..., O)


class Size(NamedTuple):
    """Of a product, as far as it decides between kernels."""

    product: Product
    is_large: bool
    rows: int  # one of `ROWS`


class Kernels:
    """Products, each by the kernel for its size. Any thread may use it."""

    def __init__(self, by_onednn: Iterable[Size] = ()) -> None:
        """``by_onednn``: what oneDNN computes; torch the rest."""
        self.by_onednn = frozenset(by_onednn)

    def to_json(self) -> list[tuple[str, bool, int]]:
        """What oneDNN computes, as plain JSON types."""
        return sorted((size.product.value, size.is_large, size.rows) for size in self.by_onednn)

    @classmethod
    def from_json(cls, sizes: object) -> Kernels:
        """Inverse of `to_json`; raises ValueError."""
        if not isinstance(sizes, list) or len(sizes) > 2 * len(Product) * len(ROWS):
            raise ValueError(f"not a list of sizes of products: {sizes!r:.80}")
        found = []
        for size in sizes:
            match size:
                case [str(product), bool(is_large), int(rows)] if rows in ROWS:
                    found.append(Size(Product(product), is_large, rows))
                case _:
                    raise ValueError(f"not a size of a product: {size!r:.80}")
        return cls(found) if found and has_both() else TORCH

    def of(self, product: Product) -> Multiply:
        """What computes it: `linear` or `matmul`."""
        return self.linear if product is Product.LINEAR else self.matmul

    def linear(self, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x`` (..., I) by ``w`` (O, I), plus ``bias`` (O,): (..., O)."""
        if self.is_onednn(Product.LINEAR, x, w) and _fits(bias, w.shape[0]):
            return _by_onednn(x, w, bias)
        return F.linear(x, w, bias)

    def matmul(self, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x`` (..., I) by ``w`` (I, O), plus ``bias`` (O,): (..., O)."""
        if self.is_onednn(Product.MATMUL, x, w) and _fits(bias, w.shape[1]):
            return _by_onednn(x, w.t(), bias)
        if bias is None:
            return torch.matmul(x, w)
        if x.dim() == 2:
            return torch.addmm(bias, x, w)
        y = x.new_empty(*x.shape[:-1], w.shape[1])
        torch.addmm(bias, x.reshape(-1, x.shape[-1]), w, out=y.view(-1, w.shape[1]))
        return y

    def is_onednn(self, product: Product, x: torch.Tensor, w: torch.Tensor) -> bool:
        """Does oneDNN compute it? What does not fit is torch's to refuse."""
        if not self.by_onednn or not x.is_cpu or not x.dtype is w.dtype is torch.float32:
            return False
        numbers = w.numel()
        if numbers < LEAST_NUMBERS or w.dim() != 2 or not w.is_contiguous() or not x.numel():
            return False
        if x.shape[-1] != w.shape[1 if product is Product.LINEAR else 0]:
            return False
        rows = x.numel() // x.shape[-1]
        return size_of(product, numbers, rows) in self.by_onednn


TORCH = Kernels()
"""torch's own for everything: the bits of the plain model."""


def size_of(product: Product, numbers: int, rows: int) -> Size:
    """Of a product of so many rows with a weight of so many numbers."""
    return Size(product, numbers >= _LARGE_NUMBERS, ROWS[bisect.bisect_right(ROWS, rows) - 1])


def has_both() -> bool:
    """Is torch built with both libraries, and oneDNN's product where inductor expects it?"""
    mkl: bool = torch.backends.mkl.is_available()
    mkldnn: bool = torch.backends.mkldnn.is_available()
    return mkl and mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _fits(bias: torch.Tensor | None, out: int) -> bool:
    return bias is None or (bias.dtype is torch.float32 and bias.shape == (out,) and bias.is_cpu)


def _by_onednn(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x`` (..., I) by ``w`` (O, I), which may be a transposed view."""
    rows = x.reshape(-1, x.shape[-1])
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, w, bias, "none", [], "")
    return y.view(*x.shape[:-1], y.shape[-1])
