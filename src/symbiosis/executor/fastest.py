"""How a device computes a model's products fastest: in which dtype, and by which kernels.

A CPU may take several times as long for bfloat16 as for float32 (without AMX or AVX512-BF16), or a
tenth of it; and torch's kernel for float32 several times as long as oneDNN's, or less. Measured on
matrices of the model itself, since no table of processors would be right for long. float32 holds
every number of a 16-bit file, so that nothing is lost by either dtype; kernels differ in the last
bits.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from symbiosis.kernels import (
    LEAST_NUMBERS,
    MANY_ROWS,
    ROWS,
    TORCH,
    Kernels,
    Product,
    Size,
    has_both,
    size_of,
)

logger = logging.getLogger(__name__)

_ROWS = (1, 256)
"""A decoder's row, which waits for weights to be read, and a prompt's or a batch's, which wait for
arithmetic. Both count alike."""

_MOST_BYTES = 128 << 20
"""Of the weights that are tried, in float32: more than caches hold, and soon done."""

_ROUNDS = 5

_WORTH_TWICE_THE_MEMORY = 1.1

_BYTES_BY_ROWS = {False: 64 << 20, True: 16 << 20}
"""Of the weights that kernels are tried with, for few rows more than most caches hold; are they
`MANY_ROWS`?"""

_WORTH_OTHER_BITS = 1.05

Key = TypeVar("Key")

Timer = Callable[[Callable[[], object], torch.device], float]
"""Seconds that a call takes on a device."""


def timed(call: Callable[[], object], device: torch.device) -> float:
    """See `Timer`."""
    _finish(device)
    started_s = time.perf_counter()
    call()
    _finish(device)
    return time.perf_counter() - started_s


@torch.no_grad()
def fastest_dtype(
    model: PreTrainedModel, device: torch.device, timer: Timer = timed
) -> torch.dtype:
    """The dtype of ``model``'s linear layers, or float32 where that is at least a tenth faster on
    ``device`` (the geometric mean over `_ROWS`), for it takes twice the memory. The model may be
    elsewhere and stays as it is."""
    sample = _sample(model)
    stored = sample[0].dtype if sample else model.dtype
    if not sample or stored not in (torch.bfloat16, torch.float16):
        return stored
    weights = {dtype: [w.to(device, dtype) for w in sample] for dtype in (stored, torch.float32)}
    speedups = []
    for rows in _ROWS:
        inner = sample[0].shape[1]
        calls = {
            dtype: _products(torch.ones(rows, inner, dtype=dtype, device=device), matrices)
            for dtype, matrices in weights.items()
        }
        took_s = _least_s(calls, device, timer)
        speedups.append(took_s[stored] / took_s[torch.float32])
        logger.info(
            "%d matrices of %s times %d rows: %.2f ms in %s, %.2f in torch.float32",
            len(sample),
            list(sample[0].shape),
            rows,
            took_s[stored] * 1e3,
            stored,
            took_s[torch.float32] * 1e3,
        )
    faster = math.prod(speedups) ** (1 / len(speedups)) >= _WORTH_TWICE_THE_MEMORY
    return torch.float32 if faster else stored


@torch.no_grad()
def fastest_kernels(weights: Iterable[torch.Tensor], timer: Timer = timed) -> Kernels:
    """The faster kernel of each size of product, on ``weights`` of a model, of which those are
    looked at that are matrices of float32 on the CPU. One or two seconds."""
    if not has_both():
        return TORCH
    matrices: dict[bool, list[torch.Tensor]] = {True: [], False: []}  # large ones, small ones
    for w in weights:
        usable = w.is_cpu and w.dtype is torch.float32 and w.dim() == 2 and w.is_contiguous()
        if usable and w.numel() >= LEAST_NUMBERS:
            matrices[size_of(Product.LINEAR, w.numel(), 1).is_large].append(w)
    kinds = [is_large for is_large, alike in matrices.items() if alike]
    sizes = [Size(*each) for each in itertools.product(Product, kinds, ROWS)]
    speedups = {size: _speedup(size, matrices[size.is_large], timer) for size in sizes}
    faster = [size for size, speedup in speedups.items() if speedup >= _WORTH_OTHER_BITS]
    if sizes:
        logger.info("oneDNN's kernel is the faster one for %d of %d sizes", len(faster), len(sizes))
    return Kernels(faster)


def _speedup(size: Size, matrices: list[torch.Tensor], timer: Timer) -> float:
    """torch's time over oneDNN's, for one pass over a part of ``matrices``."""
    parts = _parts(matrices, _BYTES_BY_ROWS[size.rows >= MANY_ROWS] // 4)
    inner = 1 if size.product is Product.LINEAR else 0
    pairs = [(torch.ones(size.rows, w.shape[inner]), w) for w in parts]
    onednn = Kernels(size._replace(is_large=is_large) for is_large in (True, False))

    def products(kernels: Kernels) -> None:
        for x, w in pairs:
            kernels.of(size.product)(x, w, None)

    calls = {each: functools.partial(products, each) for each in (TORCH, onednn)}
    took_s = _least_s(calls, torch.device("cpu"), timer)
    found = took_s[TORCH] / took_s[onednn]
    logger.debug("%s: oneDNN's kernel is %.2f times as fast", size, found)
    return found


def _parts(matrices: list[torch.Tensor], numbers: int) -> list[torch.Tensor]:
    """Some of ``matrices``, evenly over all of them; of one that is too large its first rows."""
    share = max(1, math.ceil(sum(w.numel() for w in matrices) / numbers))
    found, left = [], numbers
    for w in matrices[::share]:
        found.append(w[: max(1, left // w.shape[1])])
        left -= found[-1].numel()
        if left < w.shape[1]:
            break
    return found


def _least_s(
    calls: Mapping[Key, Callable[[], object]], device: torch.device, timer: Timer
) -> dict[Key, float]:
    """What each call took when nothing was in its way."""
    took_s = dict.fromkeys(calls, math.inf)
    for _ in range(_ROUNDS):  # in turn, since machines are noisy
        for key, call in calls.items():
            took_s[key] = min(took_s[key], timer(call, device))
    return took_s


def _sample(model: PreTrainedModel) -> list[torch.Tensor]:
    """Matrices of the shape that most numbers of the model's linear layers are in."""
    matrices = [m.weight.detach() for m in model.modules() if isinstance(m, nn.Linear)]
    if not matrices:
        return []
    sizes = Counter[torch.Size]()
    for matrix in matrices:
        sizes[matrix.shape] += matrix.numel()
    ((shape, _),) = sizes.most_common(1)
    alike = (matrix for matrix in matrices if matrix.shape == shape)
    return list(itertools.islice(alike, max(1, _MOST_BYTES // (4 * shape.numel()))))


def _products(x: torch.Tensor, matrices: list[torch.Tensor]) -> Callable[[], object]:
    return lambda: [F.linear(x, matrix) for matrix in matrices]


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
