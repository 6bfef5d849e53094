"""Masked exchanges: products in the ring of integers, for clients that send nothing but masks.

The executor sees uniform integers and multiplies them; see `symbiosis.privacy`. As a helper it
expands masks of another executor's client and multiplies those. Knows weights and exchanges;
knows nothing of connections.

Shapes: T rows, I in, O out; three words of 16 bits for each residue modulo 2^48.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors.torch import save

from symbiosis.errors import InvalidInput, ModelError, ProtocolError
from symbiosis.executor.weights import HostedWeight, Weights
from symbiosis.privacy.masks import KEY_BYTES, MaskName, expand
from symbiosis.privacy.ring import (
    RESIDUE_BYTES,
    WORDS,
    RingWeight,
    by_rows,
    from_wire,
    quantise,
    ring_product,
    to_wire,
)
from symbiosis.wire.exchange import NO_BIAS, RING_OPS, Exchange, Op
from symbiosis.wire.frames import Json
from symbiosis.wire.tensors import TensorSpec

logger = logging.getLogger(__name__)

_BITS = (8, 16)
_PARAMS = "a mask's parameters are: operation 10 or 11, bits, rows, number"


class RingPlan(NamedTuple):
    """What `check` found out."""

    rows: int
    result_bytes: int  # of a mask: as if it was kept itself, for it is work


def offer(weights: Weights, bits: tuple[int, ...]) -> None:
    """Make integers of every matrix that products are computed with. Raises ModelError."""
    for each in bits:
        if each not in _BITS:
            raise ModelError(f"masked exchanges have weights of 8 or 16 bits, not {each}")
        started_s = time.monotonic()
        table = {w.id: _quantised(w, each) for w in weights if w.axis is not None}
        weights.ring[each], weights.ring_facts[each] = table, _facts(each, table)
        logger.info(
            "masked exchanges with %d-bit weights: %d matrices in %.1f s",
            each,
            len(weights.ring[each]),
            time.monotonic() - started_s,
        )


def _quantised(hosted: HostedWeight, bits: int) -> RingWeight:
    assert hosted.axis is not None
    try:
        return quantise(hosted.dense(), hosted.axis, bits)
    except ValueError as error:
        raise ModelError(f"{hosted.names[0]} cannot be offered masked: {error}") from None


def describe(weights: Weights, bits: object) -> tuple[Json, bytes]:
    """The answer to ``{"get": "ring"}``: facts of each weight, and their scales as safetensors.

    Raises ProtocolError.
    """
    found = weights.ring_facts.get(bits if isinstance(bits, int) else 0)
    if found is None:
        raise ProtocolError(not_offered(weights, bits))
    return found


def _facts(bits: int, table: dict[int, RingWeight]) -> tuple[Json, bytes]:
    """See `describe`: made once, for it hashes all of the weights."""
    facts: list[Json] = [
        {"id": id, "axis": w.axis, "digest": w.digest(), "norms": list(w.norms)}
        for id, w in table.items()
    ]
    scales = save({str(id): w.scales for id, w in table.items()})
    return {"bits": bits, "weights": facts}, scales


def not_offered(weights: Weights, bits: object) -> str:
    """What to tell a client that asks for more than there is."""
    offered, asked = " and ".join(map(str, weights.ring)) or "none", ascii(bits)[:32]
    return (
        f"this executor does not offer masked exchanges with {asked}-bit weights (offered: "
        f"{offered}); ask its operator to serve with --masked {asked}, or connect with another "
        f"privacy mode"
    )


Admitted = TypeVar("Admitted", bound=tuple[Any, ...])


def only_ring(admitted: Admitted) -> Admitted:
    """What was admitted, its exchange first, on a session that declared itself masked; raises
    ProtocolError, which ends it, if that is no masked exchange."""
    op: Op = admitted[0].op
    if op not in RING_OPS:
        raise ProtocolError(
            f"{op.name.lower()} on a session that is masked: its client must not send anything "
            f"but masked exchanges, so the session ends"
        )
    return admitted


def check(exchange: Exchange, weights: Weights) -> RingPlan:
    """Raises InvalidInput, UnknownWeight, ProtocolError; see `symbiosis.executor.ops.check`."""
    if len(exchange.specs) != 1 or exchange.recipe or any(b != NO_BIAS for b in exchange.biases):
        raise InvalidInput(
            f"{exchange.op.name.lower()} takes one tensor, whole weights and no biases"
        )
    if exchange.op is Op.RING_MASK:
        return _check_mask(exchange, weights)
    spec = exchange.specs[0]
    bits = _bits_of(spec)
    if exchange.params:
        raise ProtocolError(f"{exchange.op.name.lower()} takes no parameters")
    outputs = [_sizes(exchange.op, w) for w in _table(exchange, weights, bits)]
    for width, _ in outputs:
        if width != spec.shape[1]:
            raise InvalidInput(f"{exchange.op.name.lower()} of {spec}: the weight takes {width}")
    rows = spec.shape[0]
    return RingPlan(rows, RESIDUE_BYTES[bits] * rows * sum(size for _, size in outputs))


def _check_mask(exchange: Exchange, weights: Weights) -> RingPlan:
    if len(exchange.params) != 4:
        raise ProtocolError(_PARAMS)
    if exchange.specs[0] != TensorSpec(torch.uint8, (KEY_BYTES,)):
        raise InvalidInput(f"a mask is expanded from {KEY_BYTES} bytes, not {exchange.specs[0]}")
    op, bits, rows, _, _ = _mask_params(exchange)
    sizes = [_sizes(op, w) for w in _table(exchange, weights, bits)]
    if len({width for width, _ in sizes}) != 1:
        raise InvalidInput("a mask for weights that do not share an input")
    residues = rows * (sizes[0][0] + sum(size for _, size in sizes))
    return RingPlan(rows, RESIDUE_BYTES[bits] * residues)


def run(
    exchange: Exchange, weights: Weights, inputs: tuple[torch.Tensor, ...]
) -> list[torch.Tensor]:
    """One tensor per weight, (T, O) int32 or (T, O, 3) int16. Computed in blocks of rows."""
    rows_of: Callable[[int, int], torch.Tensor]
    if exchange.op is Op.RING_MASK:
        op, bits, rows, number, first = _mask_params(exchange)
        table = _table(exchange, weights, bits)
        name, width = MaskName(inputs[0].numpy().tobytes(), number), _sizes(op, table[0])[0]
        rows_of = lambda start, stop: expand(name, stop - start, width, bits, first + start)  # noqa: E731
    else:
        op, table = exchange.op, _table(exchange, weights, _bits_of(exchange.specs[0]))
        words = inputs[0].cpu()
        rows, rows_of = len(words), lambda start, stop: from_wire(words[start:stop])
    matrices = [w.numbers if op is Op.RING_LINEAR else w.numbers.t() for w in table]

    def block(start: int, stop: int) -> list[torch.Tensor]:
        u = rows_of(start, stop)
        return [to_wire(ring_product(w, u)) for w in matrices]

    return by_rows(rows, max(size for w in matrices for size in w.shape), block)


def mask_rows(exchange: Exchange, start: int, stop: int) -> Exchange:
    """Rows ``start`` to ``stop`` of a RING_MASK, for `run`."""
    op, bits, _, number, _ = _mask_params(exchange)
    return exchange._replace(params=(op, bits, stop - start, number, start))


def _table(exchange: Exchange, weights: Weights, bits: int) -> list[RingWeight]:
    """The exchange's weights as integers."""
    table = weights.ring.get(bits)
    if table is None:
        raise InvalidInput(not_offered(weights, bits))
    for id in exchange.weights:
        if id not in table:
            raise InvalidInput(
                f"{weights[id].names[0]} has no masked form: only matrices of products have one"
            )
    return [table[id] for id in exchange.weights]


def _bits_of(spec: TensorSpec) -> int:
    if spec.dtype is torch.int32 and len(spec.shape) == 2:
        return 8
    if spec.dtype is torch.int16 and len(spec.shape) == 3 and spec.shape[2] == WORDS:
        return 16
    raise InvalidInput(f"residues are int32 (T, I) or int16 (T, I, {WORDS}), not {spec}")


def _sizes(op: Op, weight: RingWeight) -> tuple[int, int]:
    """(I, O) of a product."""
    first, second = weight.numbers.shape
    return (second, first) if op is Op.RING_LINEAR else (first, second)


def _mask_params(exchange: Exchange) -> tuple[Op, int, int, int, int]:
    """(RING_LINEAR or RING_MATMUL, bits, rows, number of the mask, first row)."""
    match exchange.params:
        case (Op.RING_LINEAR | Op.RING_MATMUL as op, (8 | 16) as bits, rows, number, *first):
            if 0 < rows <= 0xFFFF_FFFF and number >= 0:
                return Op(op), bits, rows, number, first[0] if first else 0
    raise ProtocolError(_PARAMS)
