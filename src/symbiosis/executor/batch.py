"""Several clients' rows as one product: joined without padding, split again.

Tokens are flattened and concatenated; a batch of one is computed on the very tensor that
arrived, so a lone client gets the numbers of the plain model bit for bit.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch

from symbiosis.executor import ops
from symbiosis.executor.chain import as_rows
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
        *[spec.dtype for spec in exchange.specs],
    )


def compute(exchanges: list[Exchange], weights: Weights) -> list[tuple[torch.Tensor, ...]]:
    """The result tensors of each exchange; all have the same `key`."""
    first = exchanges[0]
    if len(exchanges) == 1:
        return [tuple(ops.run(first, weights, first.tensors))]
    rows = [[as_rows(x) for x in exchange.tensors] for exchange in exchanges]
    outputs = ops.run(
        first, weights, tuple(torch.cat(column) for column in zip(*rows, strict=True))
    )
    sizes = [row[0].shape[0] for row in rows]
    parts = [torch.split(output, sizes) for output in outputs]
    return [
        tuple(_shaped(part[i], exchange) for part in parts) for i, exchange in enumerate(exchanges)
    ]


def _shaped(rows: torch.Tensor, exchange: Exchange) -> torch.Tensor:
    """The rows of one client (T, O) in the leading shape of its input; a chain's as they are."""
    if exchange.op is Op.CHAIN:
        return rows
    dtype, shape = exchange.specs[0]
    return rows.view(*(shape[:-1] if dtype.is_floating_point else shape), rows.shape[-1])
