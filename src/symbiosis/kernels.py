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
import functools
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

logger = logging.getLogger(__name__)

KernelChoice = Literal["exact", "fastest"]
"""Of a lone client's products: the plain model's bits, or the least time."""

ROWS = (1, 2, 4, 16, 64, 256)
"""Each is measured for as many rows and more, up to the next."""

_LEAST_NUMBERS = 1 << 16  # of a weight; with smaller ones no kernel matters
_LARGE_NUMBERS = 1 << 21
"""From here on kernels are told apart by more than their fixed cost, so both kinds are measured."""

_MOST_BYTES = 64 << 20
"""Of the weights that are tried with few rows: more than most caches hold."""

_MOST_BYTES_OF_MANY_ROWS = 16 << 20
MANY_ROWS = 64
"""From here on arithmetic counts, and not where weights come from."""

_ROUNDS = 4

_WORTH_OTHER_BITS = 1.05


Timer = Callable[[Callable[[], object]], float]
"""Seconds that a call takes."""


def timed(call: Callable[[], object]) -> float:
    """See `Timer`."""
    started_s = time.perf_counter()
    call()
    return time.perf_counter() - started_s


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
        return cls(found) if found and _has_both() else TORCH

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
        y = x.new_empty(*x.shape[:-1], w.shape[1])
        torch.addmm(bias, x.reshape(-1, x.shape[-1]), w, out=y.view(-1, w.shape[1]))
        return y

    def is_onednn(self, product: Product, x: torch.Tensor, w: torch.Tensor) -> bool:
        """Does oneDNN compute it? What does not fit is torch's to refuse."""
        if not self.by_onednn or not x.is_cpu or not x.dtype is w.dtype is torch.float32:
            return False
        numbers = w.numel()
        if numbers < _LEAST_NUMBERS or w.dim() != 2 or not w.is_contiguous() or not x.numel():
            return False
        if x.shape[-1] != w.shape[1 if product is Product.LINEAR else 0]:
            return False
        rows = x.numel() // x.shape[-1]
        return _size(product, numbers, rows) in self.by_onednn


TORCH = Kernels()
"""torch's own for everything: the bits of the plain model."""


def measured(weights: Iterable[torch.Tensor], timer: Timer = timed) -> Kernels:
    """The faster kernel of each size, on ``weights`` of a model, of which those are looked at that
    are matrices of fp32 on the CPU. About a second; other programs disturb it."""
    if not _has_both():
        return TORCH
    usable = [
        w
        for w in weights
        if w.is_cpu and w.dtype is torch.float32 and w.dim() == 2 and w.is_contiguous()
    ]
    large = [w for w in usable if w.numel() >= _LARGE_NUMBERS]
    small = [w for w in usable if _LEAST_NUMBERS <= w.numel() < _LARGE_NUMBERS]
    faster, tried = [], 0
    for matrices in filter(None, (large, small)):
        for product, rows in itertools.product(Product, ROWS):
            speedup = _speedup(product, rows, matrices, timer)
            size = _size(product, matrices[0].numel(), rows)
            tried += 1
            logger.debug("%s: oneDNN's kernel is %.2f times as fast", size, speedup)
            if speedup >= _WORTH_OTHER_BITS:
                faster.append(size)
    if tried:
        logger.info("oneDNN's kernel is the faster one for %d of %d sizes", len(faster), tried)
    return Kernels(faster)


def _size(product: Product, numbers: int, rows: int) -> Size:
    return Size(product, numbers >= _LARGE_NUMBERS, ROWS[bisect.bisect_right(ROWS, rows) - 1])


def _has_both() -> bool:
    """Is torch built with both libraries, and oneDNN's product where inductor expects it?"""
    mkl: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    mkldnn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return mkl and mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _fits(bias: torch.Tensor | None, out: int) -> bool:
    return bias is None or (bias.dtype is torch.float32 and bias.shape == (out,) and bias.is_cpu)


def _by_onednn(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x`` (..., I) by ``w`` (O, I), which may be a transposed view."""
    rows = x.reshape(-1, x.shape[-1])
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, w, bias, "none", [], "")
    return y.view(*x.shape[:-1], y.shape[-1])


@torch.no_grad()
def _speedup(product: Product, rows: int, matrices: list[torch.Tensor], timer: Timer) -> float:
    """torch's time over oneDNN's, for one pass over a sample of ``matrices``."""
    most = _MOST_BYTES_OF_MANY_ROWS if rows >= MANY_ROWS else _MOST_BYTES
    sample = _sample(matrices, most // 4)
    inner = 1 if product is Product.LINEAR else 0
    pairs = [(torch.ones(rows, w.shape[inner]), w) for w in sample]

    def all_by(kernels: Kernels) -> None:
        multiply = kernels.linear if product is Product.LINEAR else kernels.matmul
        for x, w in pairs:
            multiply(x, w, None)

    onednn = Kernels(_size(product, w.numel(), rows) for w in sample)
    took_s = {TORCH: math.inf, onednn: math.inf}
    for _ in range(_ROUNDS):  # in turn, since machines are noisy
        for kernels in took_s:
            seconds = timer(functools.partial(all_by, kernels))
            took_s[kernels] = min(took_s[kernels], seconds)
    return took_s[TORCH] / took_s[onednn]


def _sample(matrices: list[torch.Tensor], numbers: int) -> list[torch.Tensor]:
    """Some of ``matrices``, evenly over all of them; of one that is too large its first rows."""
    share = max(1, math.ceil(sum(w.numel() for w in matrices) / numbers))
    found, left = [], numbers
    for w in matrices[::share]:
        part = w[: max(1, left // w.shape[1])]
        found.append(part)
        left -= part.numel()
        if left < w.shape[1]:
            break
    return found
