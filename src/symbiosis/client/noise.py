"""The published additive noise, for fidelity: x + n goes out, W n is subtracted from the answer.

Obfuscation and no more; `tests/privacy` shows attacks that succeed. fp32 alone: noise that is
large enough to hide anything destroys the answer in bf16. Knows weights; the session sends.

Shapes: T rows, I in, O out, m vectors of a pool.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from symbiosis.errors import PrivacyError
from symbiosis.wire.exchange import Op

SendFloats = Callable[[Op, tuple[int, ...], Tensor], tuple[Tensor, ...]]
"""(operation, weights, rows) → the results."""

Dense = Callable[[int], Tensor]
"""A weight's numbers, float32."""

_Site = tuple[Op, tuple[int, ...]]


class _Pool(NamedTuple):
    """Noise of one layer, and what becomes of it."""

    vectors: Tensor  # (m, I)
    products: tuple[Tensor, ...]  # (m, O) for each weight


class Noise:
    """Products of one session with noise. Not thread-safe; the session's lock guards it."""

    def __init__(self, dense: Dense, sigma: float, pool: int | None) -> None:
        self._dense = dense
        self._sigma = sigma
        self._pool = pool
        self._levels: dict[_Site, float] = {}  # standard deviations
        self._pools: dict[_Site, _Pool] = {}
        # Of its own: the user's seeds give the same adapter with noise and without.
        self._generator = torch.Generator().manual_seed(int.from_bytes(os.urandom(7), "little"))

    def products(
        self, op: Op, weights: tuple[int, ...], x: Tensor, send: SendFloats
    ) -> tuple[Tensor, ...]:
        """LINEAR or MATMUL of ``x`` (T, I), on the CPU, with each weight. Raises PrivacyError."""
        if x.dtype is not torch.float32:
            raise PrivacyError(
                f"privacy mode noise takes fp32 alone, not {x.dtype}: in fewer bits the noise "
                f"destroys the answer. Serve with --dtype float32, or use a masked mode"
            )
        noise, products = self._drawn((op, weights), x)
        answers = send(op, weights, x + noise)
        return tuple(y - p for y, p in zip(answers, products, strict=True))

    def _drawn(self, site: _Site, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Noise for each row, and its products."""
        level = self._level(site, x)
        if self._pool is None:
            noise = torch.randn(x.shape, generator=self._generator).mul_(level)
            return noise, self._multiplied(site, noise)
        kept = self._pools.get(site)
        if kept is None:
            vectors = torch.randn(self._pool, x.shape[1], generator=self._generator).mul_(level)
            kept = _Pool(vectors, self._multiplied(site, vectors))
            if site in self._levels:
                self._pools[site] = kept
        rows = torch.randint(self._pool, (x.shape[0],), generator=self._generator)
        return kept.vectors[rows], tuple(p[rows] for p in kept.products)

    def _level(self, site: _Site, x: Tensor) -> float:
        """As large as the first input with numbers in it says; what is not finite, or zero as the
        rows that fill a bucket, says nothing."""
        if site not in self._levels:
            rows = x[x.isfinite().all(1) & x.ne(0).any(1)]
            rms = float(rows.square().mean().sqrt()) if len(rows) else 0.0
            if not 0 < rms < math.inf:
                return self._sigma
            self._levels[site] = self._sigma * rms
        return self._levels[site]

    def _multiplied(self, site: _Site, noise: Tensor) -> tuple[Tensor, ...]:
        op, weights = site
        matrices = [self._dense(weight) for weight in weights]
        return tuple(F.linear(noise, w) if op is Op.LINEAR else noise @ w for w in matrices)
