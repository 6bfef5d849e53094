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


def _rows(exchange: Exchange) -> torch.Tensor:
    x = exchange.tensors[0]
    return x.reshape(-1) if exchange.op is Op.EMBEDDING else x.reshape(-1, x.shape[-1])


def _leading(exchange: Exchange) -> tuple[int, ...]:
    shape = exchange.specs[0].shape
    return shape if exchange.op is Op.EMBEDDING else shape[:-1]
