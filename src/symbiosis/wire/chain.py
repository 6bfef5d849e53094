"""A chain: frozen products and the arithmetic between them, computed in one exchange.

A decoder sends the input of one product and gets back what it will need next: the product, the
norm behind it, the next products. Every step works on rows by themselves (no step looks at
another row), so the rows of several clients can be joined. Knows how a chain is written down;
knows nothing of who finds or runs it.
"""

from __future__ import annotations

import enum
import functools
import struct
from typing import NamedTuple

import torch

from symbiosis.errors import ProtocolError
from symbiosis.wire.exchange import Op

MAX_STEPS = 256


class Step(enum.IntEnum):
    """The closed list of steps. Values are numbered: the exchange's tensors first, then one per
    step. a, b, c: numbers of earlier values unless said otherwise; n: a number; D: the last
    dimension, over which alone a step may reduce."""

    LINEAR = 1  # a (..., I), b: index of a weight W (O, I) of the exchange → a Wᵀ + bias (..., O)
    MATMUL = 2  # a (..., I), b: index of a weight W (I, O) → a W + bias (..., O)
    EMBEDDING = 3  # a (...) int, b: index of a weight W (V, O) → (..., O)
    VECTOR = 4  # a: id of a shipped vector → (D,)
    ADD = 5  # a + b; the widths are equal or one of them is 1
    SUBTRACT = 6
    MULTIPLY = 7
    DIVIDE = 8
    ADD_NUMBER = 9  # a + n
    MULTIPLY_NUMBER = 10  # a · n
    POWER = 11  # aⁿ
    MEAN = 12  # over D: (..., D) → (..., 1)
    RSQRT = 13
    NEGATIVE = 14
    EXP = 15
    SIGMOID = 16
    TANH = 17
    RELU = 18
    SILU = 19
    GELU = 20
    GELU_TANH = 21  # the tanh approximation
    CAST = 22  # b: index into `CASTS`
    LAYER_NORM = 23  # a (..., D), weight b (D,), bias c (D,), ε = n
    RMS_NORM = 24  # a (..., D), weight b (D,), ε = n


PRODUCTS = {Op.LINEAR: Step.LINEAR, Op.MATMUL: Step.MATMUL, Op.EMBEDDING: Step.EMBEDDING}
"""The steps that are operations of their own, by what asks for them without a chain."""

CASTS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Instruction(NamedTuple):
    """One step; unused fields are 0."""

    step: Step
    a: int
    b: int = 0
    c: int = 0
    number: float = 0.0


class Chain(NamedTuple):
    """The steps in order, and the values that are the result."""

    steps: tuple[Instruction, ...]
    outputs: tuple[int, ...]


def pack_chain(chain: Chain) -> tuple[int, ...]:
    """The ``params`` of an exchange: number of steps, five integers for each, then the outputs.
    A step's number travels as the bits of its float64."""
    flat = [len(chain.steps)]
    for step in chain.steps:
        flat += [step.step, step.a, step.b, step.c, *_BITS.unpack(_FLOAT.pack(step.number))]
    return (*flat, *chain.outputs)


@functools.lru_cache(maxsize=4096)
def unpack_chain(params: tuple[int, ...]) -> Chain:
    """Inverse of `pack_chain`; raises ProtocolError. What the steps refer to is not checked."""
    count = params[0] if params else 0
    end = 1 + 5 * count
    if not 0 < count <= MAX_STEPS or not end < len(params) <= end + MAX_STEPS:
        raise ProtocolError(f"a chain of {count} steps in {len(params)} numbers")
    steps = []
    for at in range(1, end, 5):
        step, a, b, c, bits = params[at : at + 5]
        if step not in Step._value2member_map_ or min(a, b, c) < 0:
            raise ProtocolError(f"a chain has a malformed step {step} ({a}, {b}, {c})")
        steps.append(Instruction(Step(step), a, b, c, _FLOAT.unpack(_BITS.pack(bits))[0]))
    return Chain(tuple(steps), params[end:])


_FLOAT = struct.Struct("<d")
_BITS = struct.Struct("<q")
