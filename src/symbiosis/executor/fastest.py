"""In which dtype a device computes a model's products fastest: that of its files, or float32.

A CPU may take several times as long for bfloat16 as for float32 (without AMX or AVX512-BF16), or a
tenth of it. Measured on matrices of the model itself, since no table of processors would be right
for long. float32 holds every number of a 16-bit file, so that nothing is lost by either.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from itertools import islice

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_ROWS = (1, 256)
"""A decoder's row, which waits for weights to be read, and a prompt's or a batch's, which wait for
arithmetic. Both count alike."""

_MOST_BYTES = 128 << 20
"""Of the weights that are tried, in float32: more than caches hold, and soon done."""

_ROUNDS = 5

_WORTH_TWICE_THE_MEMORY = 1.1

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
        took_s = dict.fromkeys(weights, math.inf)
        for _ in range(_ROUNDS):  # in turn, since machines are noisy
            for dtype, matrices in weights.items():
                x = torch.ones(rows, matrices[0].shape[1], dtype=dtype, device=device)
                call = _products(x, matrices)
                took_s[dtype] = min(took_s[dtype], timer(call, device))
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
    return list(islice(alike, max(1, _MOST_BYTES // (4 * shape.numel()))))


def _products(x: torch.Tensor, matrices: list[torch.Tensor]) -> Callable[[], object]:
    return lambda: [F.linear(x, matrix) for matrix in matrices]


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
