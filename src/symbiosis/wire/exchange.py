"""An exchange: one operation of the closed list on frozen weights, and its result.

A client's activation goes out, the product with the frozen weight comes back. An exchange is a
pure function of (weights, operation, inputs): the executor keeps nothing between two of them.
Knows how an exchange is written down; knows nothing of who runs it.
"""

from __future__ import annotations

import enum
import functools
import struct
from collections.abc import Callable
from typing import NamedTuple

import torch

from symbiosis.errors import ProtocolError, UnknownOperation
from symbiosis.wire.tensors import TensorSpec, pack_specs, unpack_specs
from symbiosis.wire.views import Recipe

NO_BIAS = 0
"""Weight ids start at 1; 0 in place of a bias says that there is none."""


class Op(enum.IntEnum):
    """The closed list. W: the frozen weight after its view recipe, b: its frozen bias or none.

    The input gradient of `LINEAR` is `MATMUL` on the same weight and the other way round, so
    the backward pass needs no operations of its own there. Shapes: T rows, I in, O out.
    """

    LINEAR = 1  # x (..., I), W (O, I) → x Wᵀ + b (..., O)
    MATMUL = 2  # x (..., I), W (I, O) → x W + b (..., O); also GPT-2's Conv1D
    BATCHED_MATMUL = 3  # x (E, T, I), W (E, I, O) → x W (E, T, O); with parameter 1 x is (E, I, T)
    GROUPED_MATMUL = 4  # x (T, I) sorted by expert, offsets (E,) int32, W (E, I, O) → (T, O)
    EMBEDDING = 5  # ids (...) int, W (V, O) → (..., O)
    CONVOLUTION = 6  # x (N, C, ...), W, b; params: `ConvolutionParams`
    CONVOLUTION_INPUT_GRAD = 7  # dy (N, C', ...), W; params, then the input's shape
    CHAIN = 8  # products and row-wise arithmetic between them; params: `wire.chain.pack_chain`
    WEIGHT_MATMUL = 9  # x (I, T), W (O, I) → W x (O, T), both perhaps with (E, ...) in front;
    # with the parameter 1, x comes as (T, I), for the layout in memory can decide the last bits
    RING_LINEAR = 10  # residues u (T, I), W as integers (O, I) → u Wᵀ (T, O), exact in the ring
    RING_MATMUL = 11  # residues u (T, I), W as integers (I, O) → u W (T, O)
    RING_MASK = 12  # a key of 32 bytes; params: 10 or 11, bits, rows, number → that of a mask


RING_OPS = (Op.RING_LINEAR, Op.RING_MATMUL, Op.RING_MASK)
"""All that a masked session may send; see `symbiosis.privacy`."""


class Priority(enum.IntEnum):
    """Who waits for the answer: a person or a training loop. Interactive goes first."""

    INTERACTIVE = 0
    TRAINING = 1


Place = Callable[[int, torch.dtype, tuple[int, ...]], torch.Tensor | None]
"""Memory for the result of that number, dtype and shape; None if there is none for it."""


class Exchange(NamedTuple):
    """What the executor is asked to compute. Several ``weights`` share the one input."""

    op: Op
    weights: tuple[int, ...]
    biases: tuple[int, ...]  # one per weight, `NO_BIAS` for none
    recipe: Recipe  # applied to each weight
    params: tuple[int, ...]  # of the operation
    specs: tuple[TensorSpec, ...]
    tensors: tuple[torch.Tensor, ...]  # contiguous; empty until the payload has arrived
    priority: Priority
    place: Place | None = None  # in the executor: where its client would like the results


class Result(NamedTuple):
    """One tensor per weight of the exchange (one for a chain), and how the time was spent."""

    tensors: tuple[torch.Tensor, ...]
    queue_us: int  # from arrival to the start of its batch
    compute_us: int  # of the whole batch
    batch_size: int  # exchanges in that batch
    shared: bool = False  # other clients were at work, too, when the executor last looked


_FIXED = struct.Struct("<BBBBH")
_RESULT = struct.Struct("<IIHB")


def pack_exchange(exchange: Exchange) -> bytes:
    """The meta section of an EXCHANGE frame."""
    return _pack_meta(*exchange[:6], exchange.priority)


@functools.lru_cache(maxsize=4096)  # one client sends the same few heads again and again
def _pack_meta(
    op: int,
    weights: tuple[int, ...],
    biases: tuple[int, ...],
    recipe: Recipe,
    params: tuple[int, ...],
    specs: tuple[TensorSpec, ...],
    priority: int,
) -> bytes:
    fixed = _FIXED.pack(op, priority, len(weights), len(recipe), len(params))
    ids, numbers = (*weights, *biases), (*recipe, *params)
    return fixed + struct.pack(f"<{len(ids)}I{len(numbers)}q", *ids, *numbers) + pack_specs(specs)


def unpack_exchange(meta: bytes) -> Exchange:
    """Inverse of `pack_exchange`, without tensors.

    Raises ProtocolError if it is malformed, UnknownOperation if it is well-formed but names an
    operation outside the closed list.
    """
    try:
        op, priority, num_weights, num_recipe, num_params = _FIXED.unpack_from(meta)
        at = _FIXED.size
        ids = struct.unpack_from(f"<{2 * num_weights}I", meta, at)
        at += 8 * num_weights
        numbers = struct.unpack_from(f"<{num_recipe + num_params}q", meta, at)
        at += 8 * (num_recipe + num_params)
    except struct.error:
        raise ProtocolError("an exchange is cut short") from None
    specs, at = unpack_specs(meta, at)
    if at != len(meta) or not num_weights or priority > Priority.TRAINING:
        raise ProtocolError("an exchange has a malformed meta section")
    if op not in Op._value2member_map_:
        known = ", ".join(known.name.lower() for known in Op)
        raise UnknownOperation(f"operation {op} is not on this executor's list: {known}")
    return Exchange(
        Op(op),
        ids[:num_weights],
        ids[num_weights:],
        numbers[:num_recipe],
        numbers[num_recipe:],
        specs,
        (),
        Priority(priority),
    )


def pack_result(result: Result, specs: tuple[TensorSpec, ...]) -> bytes:
    """The meta section of a RESULT frame; ``specs`` describe the result's tensors."""
    timing = _RESULT.pack(
        min(result.queue_us, 0xFFFFFFFF),
        min(result.compute_us, 0xFFFFFFFF),
        min(result.batch_size, 0xFFFF),
        result.shared,
    )
    return timing + pack_specs(specs)


def unpack_result(meta: bytes) -> tuple[Result, tuple[TensorSpec, ...]]:
    """Inverse of `pack_result`: the result without its tensors, and their specs."""
    try:
        queue_us, compute_us, batch_size, shared = _RESULT.unpack_from(meta)
    except struct.error:
        raise ProtocolError("a result is cut short") from None
    specs, at = unpack_specs(meta, _RESULT.size)
    if at != len(meta):
        raise ProtocolError("a result has a malformed meta section")
    return Result((), queue_us, compute_us, batch_size, bool(shared)), specs
