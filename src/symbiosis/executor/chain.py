"""Chains in the executor: what is accepted, and how one is computed.

`check` follows shapes and dtypes through the steps before anything is allocated; `run` computes
them with the kernels that a model would use. Knows tensors and weights; knows nothing of clients.

Every value is rows × width, or a shipped vector (width,) that serves all rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from symbiosis.errors import InvalidInput
from symbiosis.executor.weights import Weights
from symbiosis.kernels import Kernels
from symbiosis.wire.chain import CASTS, PRODUCTS, Chain, Instruction, Step, unpack_chain
from symbiosis.wire.exchange import NO_BIAS, Exchange
from symbiosis.wire.tensors import ITEM_BYTES, TensorSpec

_IDS = (torch.int64, torch.int32)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PRODUCTS = frozenset(PRODUCTS.values())

_BINARY: dict[Step, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    Step.ADD: torch.add,
    Step.SUBTRACT: torch.sub,
    Step.MULTIPLY: torch.mul,
    Step.DIVIDE: torch.div,
}
_NUMBER: dict[Step, Callable[[torch.Tensor, float], torch.Tensor]] = {
    Step.ADD_NUMBER: torch.add,
    Step.MULTIPLY_NUMBER: torch.mul,
    Step.POWER: torch.pow,
}
_UNARY: dict[Step, Callable[[torch.Tensor], torch.Tensor]] = {
    Step.MEAN: lambda a: a.mean(-1, keepdim=True),
    Step.RSQRT: torch.rsqrt,
    Step.NEGATIVE: torch.neg,
    Step.EXP: torch.exp,
    Step.SIGMOID: torch.sigmoid,
    Step.TANH: torch.tanh,
    Step.RELU: torch.relu,
    Step.SILU: F.silu,
    Step.GELU: F.gelu,
    Step.GELU_TANH: lambda a: F.gelu(a, approximate="tanh"),
}


class _Value(NamedTuple):
    """What is known of a value before it exists."""

    width: int  # 0: ids, which have no width
    dtype: torch.dtype
    is_vector: bool = False


def check(exchange: Exchange, weights: Weights) -> int:
    """The bytes that the values and the result of a chain take together. Raises InvalidInput,
    UnknownWeight, ProtocolError with what is wrong."""
    if not exchange.specs or exchange.recipe:
        raise InvalidInput("a chain takes at least one tensor, and weights as they are")
    rows = rows_of(exchange.specs[0])
    if any(rows_of(spec) != rows for spec in exchange.specs):
        raise InvalidInput("the tensors of a chain must have the same number of rows")
    chain = unpack_chain(exchange.params)
    values = [_input(spec) for spec in exchange.specs]
    for step in chain.steps:
        values.append(_follow(step, values, exchange, weights))
    for output in chain.outputs:
        if _earlier(values, output).is_vector or not values[output].width:
            raise InvalidInput("a chain returns rows of floats")
    if not chain.outputs or len({values[output].dtype for output in chain.outputs}) != 1:
        raise InvalidInput("a chain must return values, of one dtype")
    results = [values[output] for output in chain.outputs]
    return rows * sum(v.width * ITEM_BYTES[v.dtype] for v in (*values, *results))


def run(
    exchange: Exchange,
    weights: Weights,
    inputs: tuple[torch.Tensor, ...],
    kernels: Kernels,
) -> list[torch.Tensor]:
    """The outputs of a checked chain side by side, as one tensor (rows, sum of widths), for
    ``inputs`` (its own tensors, or several clients' rows joined); products by ``kernels``."""
    chain: Chain = unpack_chain(exchange.params)
    values = [as_rows(x).to(weights.device) for x in inputs]
    for step in chain.steps:
        if step.step in _PRODUCTS:
            weight, bias = exchange.weights[step.b], exchange.biases[step.b]
            values.append(_product(step.step, values[step.a], weight, bias, weights, kernels))
        else:
            values.append(compute_step(step, values, weights))
    return [torch.cat([values[output] for output in chain.outputs], 1)]


def lookups(exchange: Exchange, weights: Weights) -> tuple[tuple[int, int], ...]:
    """For each embedding of a checked chain: which tensor holds the ids, and its weight's rows."""
    return tuple(
        (step.a, weights[exchange.weights[step.b]].tensor.shape[0])
        for step in unpack_chain(exchange.params).steps
        if step.step is Step.EMBEDDING
    )


def rows_of(spec: TensorSpec) -> int:
    """The rows of a tensor: its tokens."""
    return math.prod(spec.shape if spec.dtype in _IDS else spec.shape[:-1])


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """Ids (...) → (T,), activations (..., I) → (T, I)."""
    if not x.is_floating_point():
        return x.reshape(-1)
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # -1 would be no number for a width of 0


def _input(spec: TensorSpec) -> _Value:
    if spec.dtype in _IDS:
        return _Value(0, spec.dtype)
    if spec.dtype not in _FLOATS or not spec.shape:
        raise InvalidInput(f"a chain takes rows of floats or token ids, not {spec}")
    return _Value(spec.shape[-1], spec.dtype)


def _earlier(values: list[_Value], number: int) -> _Value:
    if not 0 <= number < len(values):
        raise InvalidInput(f"a chain uses value {number} before it is computed")
    return values[number]


def _follow(
    step: Instruction, values: list[_Value], exchange: Exchange, weights: Weights
) -> _Value:
    """What a step makes of the values before it."""
    if step.step is Step.VECTOR:
        vector = weights.vector(step.a)
        return _Value(vector.shape[0], vector.dtype, is_vector=True)
    a = _earlier(values, step.a)
    if step.step in _PRODUCTS:
        return _follow_product(step, a, exchange, weights)
    if a.is_vector or not a.width:
        raise InvalidInput(f"{step.step.name.lower()} in a chain takes rows of floats")
    if step.step in _BINARY:
        b = _earlier(values, step.b)
        if not b.width or (a.width != b.width and (b.is_vector or 1 not in (a.width, b.width))):
            raise InvalidInput(f"widths {a.width} and {b.width} do not go together in a chain")
        return _Value(max(a.width, b.width), torch.promote_types(a.dtype, b.dtype))
    if step.step in (Step.LAYER_NORM, Step.RMS_NORM):
        for number in (step.b, step.c)[: 2 if step.step is Step.LAYER_NORM else 1]:
            if _earlier(values, number) != _Value(a.width, a.dtype, is_vector=True):
                raise InvalidInput(f"a norm of width {a.width} takes vectors of that width")
        return a
    if step.step is Step.CAST:
        if step.b >= len(CASTS):
            raise InvalidInput(f"there is no cast {step.b}")
        return a._replace(dtype=CASTS[step.b])
    return a._replace(width=1) if step.step is Step.MEAN else a


def _follow_product(step: Instruction, a: _Value, exchange: Exchange, weights: Weights) -> _Value:
    if step.b >= len(exchange.weights):
        raise InvalidInput(f"a chain uses weight {step.b} of {len(exchange.weights)}")
    w = weights[exchange.weights[step.b]].tensor
    if w.dim() == 2 and not a.is_vector:
        if step.step is Step.EMBEDDING and not a.width and exchange.specs[step.a].dtype in _IDS:
            return _Value(w.shape[1], weights.dtype)
        rows_in, out = w.shape if step.step is Step.MATMUL else (w.shape[1], w.shape[0])
        bias = exchange.biases[step.b]
        fits = bias == NO_BIAS or weights.vector(bias).shape[0] == out
        if step.step is not Step.EMBEDDING and a.width == rows_in and fits:
            return _Value(out, a.dtype)
    raise InvalidInput(
        f"{step.step.name.lower()} of width {a.width} does not fit a weight of {list(w.shape)}"
    )


def compute_step(step: Instruction, values: list[torch.Tensor], weights: Weights) -> torch.Tensor:
    """The value of a step that is no product, from the values before it."""
    kind, a, b, c, number = step
    if kind in _BINARY:
        return _BINARY[kind](values[a], values[b])
    if kind in _UNARY:
        return _UNARY[kind](values[a])
    if kind in _NUMBER:
        return _NUMBER[kind](values[a], number)
    if kind is Step.VECTOR:
        return weights.vector(a)
    if kind is Step.CAST:
        return values[a].to(CASTS[b])
    x = values[a]
    if kind is Step.LAYER_NORM:
        return F.layer_norm(x, x.shape[-1:], values[b], values[c], number)
    return F.rms_norm(x, x.shape[-1:], values[b], number)


def _product(
    kind: Step,
    x: torch.Tensor,
    weight: int,
    bias_id: int,
    weights: Weights,
    kernels: Kernels,
) -> torch.Tensor:
    w = weights.view(weight, ())
    bias = None if bias_id == NO_BIAS else weights.vector(bias_id)
    if kind is Step.EMBEDDING:
        return F.embedding(x, w)
    dtype = x.dtype
    x = x if dtype is w.dtype else x.to(w.dtype)
    multiply = kernels.linear if kind is Step.LINEAR else kernels.matmul
    y = multiply(x, w, bias)
    return y if dtype is y.dtype else y.to(dtype)
