"""Several clients' rows as one product: joined without padding, split again.

Tokens are flattened and concatenated; a batch of one is computed on the very tensor that
arrived, so a lone client gets the numbers of the plain model bit for bit.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch

from symbiosis.executor import ops
from symbiosis.executor.weights import Weights
from symbiosis.wire.exchange import Exchange, Op


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
        exchange.specs[0].dtype,
    )


def compute(exchanges: list[Exchange], weights: Weights) -> list[tuple[torch.Tensor, ...]]:
    """The result tensors of each exchange; all have the same `key`."""
    first = exchanges[0]
    if len(exchanges) == 1:
        return [tuple(ops.run(first, weights, first.tensors))]
    joined = torch.cat([_rows(exchange) for exchange in exchanges])
    outputs = ops.run(first, weights, (joined,))
    sizes = [_rows(exchange).shape[0] for exchange in exchanges]
    parts = [torch.split(output, sizes) for output in outputs]
    return [
        tuple(part[i].view(*_leading(exchange), part[i].shape[-1]) for part in parts)
        for i, exchange in enumerate(exchanges)
    ]


class Pieces:
    """One exchange's results, put together as its rows are computed, piece by piece.

    On the CPU in fp32 the rows have the bits of the whole product as long as no piece is a single
    row (measured with MKL on one thread); other kernels may differ in the last bit, as in a batch.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._rows = _rows(exchange)
        self._results: tuple[torch.Tensor, ...] = ()
        self.elapsed_s = 0.0

    def exchange(self, start: int, stop: int) -> Exchange:
        """Rows ``start`` to ``stop`` as an exchange."""
        return self._exchange._replace(tensors=(self._rows[start:stop],))

    def add(self, start: int, outputs: tuple[torch.Tensor, ...]) -> None:
        """Those rows' outputs."""
        if not self._results:
            rows = self._rows.shape[0]
            self._results = tuple(output.new_empty(rows, output.shape[-1]) for output in outputs)
        for result, output in zip(self._results, outputs, strict=True):
            result[start : start + output.shape[0]] = output

    def results(self) -> tuple[torch.Tensor, ...]:
        """As `compute` returns them, once all rows are there."""
        leading = _leading(self._exchange)
        return tuple(result.view(*leading, result.shape[-1]) for result in self._results)


def divisible(exchange: Exchange, joinable: bool) -> bool:
    """May it be computed in `Pieces`? A lookup is too cheap for it."""
    return joinable and exchange.op is not Op.EMBEDDING


def _rows(exchange: Exchange) -> torch.Tensor:
    x = exchange.tensors[0]
    return x.reshape(-1) if exchange.op is Op.EMBEDDING else x.reshape(-1, x.shape[-1])


def _leading(exchange: Exchange) -> tuple[int, ...]:
    shape = exchange.specs[0].shape
    return shape if exchange.op is Op.EMBEDDING else shape[:-1]
