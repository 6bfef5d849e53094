"""Is an answer the product that was asked for? A random check that costs little.

For y = x Wᵀ + b and a vector r, ⟨r, y⟩ = ⟨Wᵀr, x⟩ + ⟨r, b⟩ (Freivalds 1977). An *anchor* is r
with Wᵀr, made once for each weight; after that a check needs no exchange, two products with a
few vectors. Where anchors come from decides what is caught: from the executor itself (asked
once, as an ordinary product) everything that changes later or is computed wrong; from trusted
weights (`symbiosis.client.trusted`) also an executor that computes with others and stays
consistent, for then it never learns r. Knows tensors; knows no channels.

Shapes: T rows, I in, O out, K probes.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from symbiosis.client.linking import SENT, Ask
from symbiosis.errors import IntegrityError
from symbiosis.wire.exchange import NO_BIAS, Op
from symbiosis.wire.views import Recipe

PROBES = 4
"""Entries of r are drawn from 16 integers, so a wrong row passes one probe with a probability of
at most 1/16 (Schwartz 1980, Zippel 1979), all four with 1.5e-5; and errors below the tolerance."""

_LEAST = 4  # of the magnitudes 4 to 11: exact in every dtype, and no entry weighs little

CHECKED = (Op.LINEAR, Op.MATMUL, Op.EMBEDDING)
"""Products with whole weights; a chain's products too."""

_TAIL = 8.0
"""A sum of independent rounding errors |δᵢ| ≤ u of mean zero exceeds 8 u‖a‖ with a probability
of at most 2 exp(-32) (Hoeffding 1963; the model of rounding of Higham and Mary 2019)."""

_SUM = 32.0
"""In u‖w‖‖x‖: how far a sum of products may be off. Higham and Mary give λ√n u for a chain of n
additions; kernels add in blocks of at most about 400. Measured: at most 6.0."""

_HUGE = 1e100
"""What is larger is not squared: fp64 ends at 1.8e308."""


class Anchor(NamedTuple):
    """A weight as a check sees it. Small: K (O + 4 I) bytes for an fp32 weight."""

    r: Tensor  # (O, K) int8
    wr: Tensor  # (I, K): Wᵀ r, of an embedding (V, K): W r; float64 if W is, else float32
    norm: float  # ‖W‖_F


class Anchors(Protocol):
    """Where anchors come from."""

    def anchor(self, op: Op, weight: int) -> Anchor | None:
        """For LINEAR or MATMUL (or EMBEDDING) with a weight; None if there is none."""

    def bias(self, number: int) -> Tensor:
        """A frozen bias (O,) by its id."""


class OwnWord:
    """Anchors that the executor itself gives, once for each weight."""

    def __init__(
        self,
        ask: Callable[[Op, int, Tensor], Tensor],
        shape: Callable[[int], tuple[int, ...]],
        biases: Callable[[], dict[int, Tensor]],
        dtype: torch.dtype,
    ) -> None:
        """``ask`` makes the executor compute a product with a whole weight of that ``shape`` and
        ``dtype``; ``biases`` are read when the first is needed."""
        self._ask = ask
        self._shape = shape
        self._read_biases = biases
        self._biases: dict[int, Tensor] | None = None
        self._dtype = dtype
        self._known: dict[tuple[Op, int], Anchor] = {}

    def anchor(self, op: Op, weight: int) -> Anchor | None:
        kind = Op.LINEAR if op is Op.LINEAR else Op.MATMUL  # a lookup's is that of x W
        shape = self._shape(weight)
        if len(shape) != 2:
            return None
        if (kind, weight) not in self._known:
            r = probes(shape[0 if kind is Op.LINEAR else 1])
            back = Op.MATMUL if kind is Op.LINEAR else Op.LINEAR
            wr = self._ask(back, weight, r.t().to(self._dtype).contiguous()).t()
            sizes = wr.double().square().sum(0) / r.double().square().mean(0)
            self._known[kind, weight] = Anchor(r, _kept(wr), math.sqrt(float(sizes.max())))
        return self._known[kind, weight]

    def bias(self, number: int) -> Tensor:
        if self._biases is None:
            self._biases = self._read_biases()
        return self._biases[number]


def anchor_of(matrix: Tensor, op: Op) -> Anchor:
    """From a weight at hand: (O, I) for LINEAR, else (I, O)."""
    w = matrix.double()
    w = w.t() if op is Op.LINEAR else w
    r = probes(w.shape[1])
    wr = w @ r.double()
    return Anchor(r, wr if matrix.dtype is torch.float64 else _kept(wr.float()), float(w.norm()))


def probes(size: int) -> Tensor:
    """K secret vectors: (size, K) int8, magnitudes 4 to 11, either sign."""
    drawn = torch.frombuffer(bytearray(os.urandom(size * PROBES)), dtype=torch.uint8)
    magnitudes = (drawn & 7).to(torch.int8) + _LEAST
    return torch.where(drawn >= 128, -magnitudes, magnitudes).view(size, PROBES)


def _kept(wr: Tensor) -> Tensor:
    return wr.contiguous() if wr.dtype is torch.float64 else wr.float().contiguous()


class Integrity:
    """Checks a random share of a session's products. Guarded by the session's lock."""

    def __init__(
        self,
        share: float,
        anchors: Anchors,
        name: Callable[[int], str],
        hosted: torch.dtype,
    ) -> None:
        """``share`` of the exchanges, 0 to 1; ``hosted`` is the dtype of the weights."""
        self._share = share
        self._anchors = anchors
        self._name = name
        self._hosted = hosted
        self._random = random.SystemRandom().random  # the executor must not foresee it
        self._asking = False
        self.checked = 0
        """Products compared so far."""
        self.unchecked = 0
        """Products of drawn exchanges that have no check: other operations, views of weights."""

    def exchange(
        self,
        op: Op,
        weights: tuple[int, ...],
        biases: tuple[int, ...],
        recipe: Recipe,
        x: Tensor,
        results: tuple[Tensor, ...],
    ) -> None:
        """An exchange but a chain was answered; raises IntegrityError."""
        if self._drawn():
            for weight, bias, y in zip(weights, biases, results, strict=True):
                self._check(op, weight, bias, recipe, x, y)

    def chain(self, ask: Ask, x: Tensor, outputs: Tensor) -> None:
        """A chain was answered. Its client compares the inputs of its products with its own
        anyway; here are the products."""
        if self._drawn():
            parts = {SENT: x, **dict(enumerate(torch.split(outputs, list(ask.widths), 1)))}
            for answer in ask.answers:
                op, weight, recipe, bias = answer.member
                self._check(op, weight, bias, recipe, parts[answer.input], parts[answer.result])

    def _drawn(self) -> bool:
        """Is this exchange to be checked? Decided after its answer is there."""
        return not self._asking and self._random() < self._share

    def _check(self, op: Op, weight: int, bias: int, recipe: Recipe, x: Tensor, y: Tensor) -> None:
        self._asking = True  # an anchor may take an exchange
        try:
            whole = op in CHECKED and not recipe
            anchor = self._anchors.anchor(op, weight) if whole else None
            if anchor is None:
                self.unchecked += 1
                return
            b = None if bias == NO_BIAS else self._anchors.bias(bias)
        finally:
            self._asking = False
        self.checked += 1
        if op is Op.EMBEDDING:
            wrong = _wrong_rows(x, y, anchor)
        else:
            wrong = _wrong_products(x, y, anchor, b, self._hosted)
        if wrong:
            raise IntegrityError(
                f"{wrong} of {y.numel() // y.shape[-1]} rows that the executor returned for "
                f"{op.name.lower()} with {self._name(weight)} are not that product: it computes "
                f"wrongly, or with other weights. This session has ended; what it computed "
                f"before may be wrong too"
            )


def roundoff(dtype: torch.dtype) -> float:
    """u: half the distance from 1 to the next number."""
    return torch.finfo(dtype).eps / 2


def _least(dtype: torch.dtype) -> float:
    """The smallest number above zero."""
    return torch.finfo(dtype).tiny * torch.finfo(dtype).eps


def _wrong_products(
    x: Tensor, y: Tensor, anchor: Anchor, bias: Tensor | None, hosted: torch.dtype
) -> int:
    """How many rows of ``y`` (..., O) are not x (..., I) Wᵀ + b, within rounding."""
    x_TI = x.reshape(-1, x.shape[-1]).cpu().double()
    y_TO = y.reshape(-1, y.shape[-1]).cpu().double()
    r, wr = anchor.r.double(), anchor.wr.double()
    b = torch.zeros(()) if bias is None else bias.cpu()
    b_TO = b.double().expand_as(y_TO)
    most = min(torch.finfo(dtype).max for dtype in (x.dtype, hosted))
    possible = _could_be_finite(most, x_TI, y_TO, anchor)
    if x.dtype is torch.float64:
        x_TI, y_TO, b_TO = _squarable(x_TI, y_TO, b_TO)
    right = x_TI @ wr + b_TO @ r
    allowed = _allowed(x.dtype, x_TI, y_TO, b_TO, anchor, hosted)
    error = (y_TO @ r - right).abs()
    off = ~((error <= allowed) & error.isfinite()).all(1)
    return int((off & possible).sum())


def _squarable(*parts: Tensor) -> list[Tensor]:
    """Rows of one product, in fp64, made smaller together where a square would overflow."""
    largest = torch.stack([part.abs().amax(1) for part in parts]).amax(0)
    divisor = torch.where((largest > _HUGE) & largest.isfinite(), largest, 1.0).unsqueeze(1)
    return [part / divisor for part in parts]


def _allowed(
    dtype: torch.dtype,
    x_TI: Tensor,
    y_TO: Tensor,
    b_TO: Tensor,
    anchor: Anchor,
    hosted: torch.dtype,
) -> Tensor:
    """How far ⟨r, y⟩ may be off: (T, K). In order: sums of products in fp32 or fp64 (Wᵀr may be
    one, of O products); sums that begin with a bias; y rounded to its dtype, and before its bias
    is added; x rounded to W's dtype, or Wᵀr; what is lost near zero; this check's own sums."""
    r, wr = anchor.r.double(), anchor.wr.double()
    exact = dtype is hosted is torch.float64
    summed = roundoff(torch.float64 if exact else torch.float32)
    rounded = max(roundoff(dtype), roundoff(hosted))
    read = max(roundoff(anchor.wr.dtype), roundoff(hosted))
    least = max(_least(dtype), _least(hosted))
    own, inner, outer = roundoff(torch.float64), math.sqrt(len(wr)), math.sqrt(len(r))
    norms = anchor.norm * x_TI.norm(dim=1, keepdim=True) * float(r.square().mean().sqrt())
    seen = ((y_TO.square() + (y_TO - b_TO).square()) @ r.square()).sqrt()
    taken = (x_TI.square() @ wr.square()).sqrt()
    allowed: Tensor = (
        _SUM * summed * (1 + outer / inner) * norms
        + _TAIL * summed * inner * (b_TO.square() @ r.square()).sqrt()
        + _TAIL * rounded * seen
        + _TAIL * read * taken
        + _TAIL * least * (r.norm(dim=0) + wr.norm(dim=0))
        + _TAIL * own * (outer * seen + inner * taken)
    )
    return allowed


def _could_be_finite(most: float, x_TI: Tensor, y_TO: Tensor, anchor: Anchor) -> Tensor:
    """Not the rows whose input is not finite, or whose product may be beyond ``most``: (T,)."""
    within = x_TI.norm(dim=1) * anchor.norm < most / 2
    possible: Tensor = x_TI.isfinite().all(1) & (y_TO.isfinite().all(1) | within)
    return possible


def _wrong_rows(ids: Tensor, y: Tensor, anchor: Anchor) -> int:
    """How many rows of ``y`` (..., O) are not the weight's rows ``ids`` (...). Copies: only Wr
    is rounded."""
    y_TO = y.reshape(-1, y.shape[-1]).cpu().double()
    r, expected = anchor.r.double(), anchor.wr[ids.reshape(-1).cpu().long()].double()
    spread = (y_TO.square() @ r.square()).sqrt()
    summed = roundoff(anchor.wr.dtype) * math.sqrt(y_TO.shape[1])
    allowed = _TAIL * (summed * spread + roundoff(y.dtype) * expected.abs())
    return int((~((y_TO @ r - expected).abs() <= allowed).all(1)).sum())
