"""Exchanges in one line, for tests that ask an executor without a client's model."""

from __future__ import annotations

import torch

from symbiosis.executor.executor import Executor
from symbiosis.executor.weights import Weights
from symbiosis.wire.exchange import NO_BIAS, Exchange, Op, Priority
from symbiosis.wire.tensors import spec_of


def exchange(
    op: Op,
    weights: int | tuple[int, ...],
    *tensors: torch.Tensor,
    biases: tuple[int, ...] = (),
    recipe: tuple[int, ...] = (),
    params: tuple[int, ...] = (),
    priority: Priority = Priority.TRAINING,
) -> Exchange:
    """``op`` of ``tensors`` on one or several weights."""
    ids = weights if isinstance(weights, tuple) else (weights,)
    return Exchange(
        op,
        ids,
        biases or (NO_BIAS,) * len(ids),
        recipe,
        params,
        tuple(spec_of(tensor) for tensor in tensors),
        tensors,
        priority,
    )


def weight_id(base: Executor | Weights, name: str) -> int:
    """The id of the hosted weight whose name ends in ``name``."""
    weights = base.weights if isinstance(base, Executor) else base
    return next(w.id for w in weights if any(full.endswith(name) for full in w.names))
