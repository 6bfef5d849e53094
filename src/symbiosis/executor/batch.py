"""Several clients' rows as one product: joined without padding, split again.

Tokens are flattened and concatenated; a batch of one is computed on the very tensor that
arrived, so a lone client gets the numbers of the plain model bit for bit.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch

from symbiosis.executor import ops
from symbiosis.executor.chain import as_rows
from symbiosis.executor.ring import mask_rows
from symbiosis.executor.weights import Weights
from symbiosis.kernels import Kernels
from symbiosis.wire.exchange import RING_OPS, Exchange, Op

_DIVISIBLE = (Op.LINEAR, Op.MATMUL, Op.RING_LINEAR, Op.RING_MATMUL)


def key(exchange: Exchange, joinable: bool, unique: int) -> Hashable:
    """Exchanges with equal keys can be joined; one that cannot be joined is alone with its key."""
    if not joinable:
        return unique
    return (
        exchange.op,
        exchange.weights,
        exchange.biases,
        exchange.recipe,
        exchange.params,
        *[spec.dtype for spec in exchange.specs],
    )


def compute(
    exchanges: list[Exchange], weights: Weights, kernels: Kernels | None = None
) -> list[tuple[torch.Tensor, ...]]:
    """The result tensors of each exchange; all have the same `key`. ``kernels`` compute a batch of
    one, by default as for one client; it has rows of several if they have been joined before."""
    first = exchanges[0]
    if len(exchanges) == 1:
        return [tuple(ops.run(first, weights, first.tensors, kernels))]
    rows = [[_rows(exchange, x) for x in exchange.tensors] for exchange in exchanges]
    joined = tuple(cat(column, weights.device) for column in zip(*rows, strict=True))
    outputs = ops.run(first._replace(place=None), weights, joined, weights.for_joined)
    sizes = [row[0].shape[0] for row in rows]
    parts = [torch.split(output, sizes) for output in outputs]
    return [
        tuple(_shaped(part[i], exchange) for part in parts) for i, exchange in enumerate(exchanges)
    ]


def cat(rows: tuple[torch.Tensor, ...], device: torch.device) -> torch.Tensor:
    """Several clients' rows, which need not lie on one device: then on the weights' ``device``."""
    if len(rows) == 1:
        return rows[0]
    if any(x.device != rows[0].device for x in rows):
        rows = tuple(x.to(device) for x in rows)
    return torch.cat(rows)


def _rows(exchange: Exchange, x: torch.Tensor) -> torch.Tensor:
    """An input as rows; residues come so."""
    return x if exchange.op in RING_OPS else as_rows(x)


def _shaped(rows: torch.Tensor, exchange: Exchange) -> torch.Tensor:
    """The rows of one client (T, O) in the leading shape of its input; a chain's and residues as
    they are."""
    if exchange.op is Op.CHAIN or exchange.op in RING_OPS:
        return rows
    dtype, shape = exchange.specs[0]
    return rows.view(*(shape[:-1] if dtype.is_floating_point else shape), rows.shape[-1])


class Pieces:
    """One exchange's results, put together as its rows are computed, piece by piece.

    On the CPU in fp32 the rows have the bits of the whole product as long as no piece is a single
    row (measured with MKL on one thread); other kernels may differ in the last bit, as in a batch.
    """

    def __init__(self, exchange: Exchange, rows: int) -> None:
        self._exchange = exchange
        self._num_rows = rows
        self._results: tuple[torch.Tensor, ...] = ()
        self.elapsed_s = 0.0

    def exchange(self, start: int, stop: int) -> Exchange:
        """Rows ``start`` to ``stop`` as an exchange."""
        if self._exchange.op is Op.RING_MASK:  # which comes as a name
            return mask_rows(self._exchange, start, stop)
        rows = _rows(self._exchange, self._exchange.tensors[0])[start:stop]
        return self._exchange._replace(tensors=(rows,), place=None)

    def add(self, start: int, outputs: tuple[torch.Tensor, ...]) -> None:
        """Those rows' outputs."""
        if not self._results:
            shapes = [(self._num_rows, *output.shape[1:]) for output in outputs]
            self._results = tuple(y.new_empty(s) for y, s in zip(outputs, shapes, strict=True))
        for result, output in zip(self._results, outputs, strict=True):
            result[start : start + output.shape[0]] = output

    def results(self) -> tuple[torch.Tensor, ...]:
        """As `compute` returns them, once all rows are there."""
        return tuple(_shaped(result, self._exchange) for result in self._results)


def divisible(exchange: Exchange, joinable: bool) -> bool:
    """May it be computed in `Pieces`? A lookup or a decoder's chain is too cheap for it; a mask
    has rows that are its client's alone."""
    return exchange.op is Op.RING_MASK or (joinable and exchange.op in _DIVISIBLE)
