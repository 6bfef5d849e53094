"""Good frames of every kind, as real clients send them and a real executor answers."""

from __future__ import annotations

from typing import NamedTuple

import peft
import torch

import tiny
from symbiosis import Executor, Session
from symbiosis.executor.weights import Weights
from symbiosis.transport.inproc import InprocChannel
from symbiosis.wire.exchange import (
    NO_BIAS,
    Exchange,
    Op,
    Priority,
    Result,
    pack_exchange,
    pack_result,
)
from symbiosis.wire.frames import Json, Kind, exchange_parts, json_frame
from symbiosis.wire.places import INLINE, Places, Room, pack_places
from symbiosis.wire.tensors import offsets, spec_of
from symbiosis.wire.views import View

MAX_PAYLOAD = 1 << 20
"""Of the executor that is fuzzed, so that a mutation that makes sense costs little."""


class Good(NamedTuple):
    """A frame as it should be. ``exchange`` where it is one, for mutations that know its fields."""

    frame: bytes
    exchange: Exchange | None = None


class Corpus(NamedTuple):
    """What clients send, and what an executor sends."""

    hellos: list[Good]
    requests: list[Good]
    exchanges: list[Good]
    answers: list[Good]


class _Recording(InprocChannel):
    """A channel that notes what goes through it."""

    seen: list[tuple[Exchange, Result]]

    def exchange(self, exchange: Exchange) -> Result:
        result = super().exchange(exchange)
        sent = exchange._replace(tensors=_copies(exchange.tensors))
        self.seen.append((sent, result._replace(tensors=_copies(result.tensors))))
        return result


def _copies(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """A model may change what it has."""
    return tuple(tensor.detach().clone() for tensor in tensors)


def executor() -> Executor:
    """The one that is fuzzed: every operation has weights that it fits."""
    return Executor(Weights(tiny.mixtral(), "tiny"), max_payload_bytes=MAX_PAYLOAD, masked=(8, 16))


def corpus(base: Executor) -> Corpus:
    """Frames for ``base``: decoding, training, lookups, chains, experts, convolutions."""
    pairs = _recorded(base)
    exchanges = [exchange for exchange, _ in pairs] + [*_others(base)]
    sent = [Good(frame_of(exchange), exchange) for exchange in exchanges]
    placed = [Good(_placed(e)) for e in exchanges if e.op in (Op.LINEAR, Op.MATMUL, Op.CHAIN)]
    results = [Good(_result_frame(result)) for _, result in pairs]
    return Corpus(_hellos(), _requests(), sent + placed[:40], results + _replies(base))


def frame_of(exchange: Exchange) -> bytes:
    """As it is sent through a socket."""
    meta = pack_exchange(exchange)
    parts = exchange_parts(Kind.EXCHANGE, 7, meta, exchange.specs, exchange.tensors)
    return b"".join(parts)


def _recorded(base: Executor) -> list[tuple[Exchange, Result]]:
    seen: list[tuple[Exchange, Result]] = []

    def dial(hello: Json) -> _Recording:
        channel = _Recording(base, hello)
        channel.seen = seen
        return channel

    with Session(dial, "inproc") as session:
        model = session.model()
        model.generate(tiny.tokens(1, 5), max_new_tokens=8, do_sample=False)
        lora = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
        ids = tiny.tokens()
        lora(input_ids=ids, labels=ids).loss.backward()
    distinct = {(e[:6]): (e, r) for e, r in seen}  # one of each shape is enough
    return list(distinct.values())[:120]


def _others(base: Executor) -> list[Exchange]:
    """What this model's clients do not ask for."""
    matrix = next(w.id for w in base.weights if tuple(w.tensor.shape) == (32, 32))
    experts = next(w for w in base.weights if w.tensor.dim() == 3)
    count, outer, inner = experts.tensor.shape
    unsqueezed = (int(View.UNSQUEEZE), 1, 2)
    convolution = (1, 1, 0, 1, 0, 0, 1)
    x = torch.randn(1, 32, 5)
    flipped = (int(View.TRANSPOSE), 2, 0, 1)
    offs = torch.tensor([1, 2, 3, 4][:count], dtype=torch.int32)
    turned = (int(View.TRANSPOSE), 2, 1, 2)
    return [
        _exchange(Op.LINEAR, matrix, torch.randn(3, 32), recipe=flipped),
        _exchange(Op.LINEAR, matrix, torch.randn(2, 32).bfloat16()),
        _exchange(Op.CONVOLUTION, matrix, x, recipe=unsqueezed, params=convolution),
        _exchange(
            Op.CONVOLUTION_INPUT_GRAD, matrix, x, recipe=unsqueezed, params=(*convolution, 1, 32, 5)
        ),
        _exchange(Op.WEIGHT_MATMUL, matrix, torch.randn(32, 4)),
        _exchange(Op.WEIGHT_MATMUL, matrix, torch.randn(4, 32), params=(1,)),
        _exchange(Op.BATCHED_MATMUL, experts.id, torch.randn(count, 3, outer)),
        _exchange(Op.GROUPED_MATMUL, experts.id, torch.randn(4, inner), offs, recipe=turned),
        *_ring(matrix),
    ]


def _ring(matrix: int) -> list[Exchange]:
    """Masked: residues modulo 2^32 and 2^48, and what a helper is asked for."""
    words = torch.randint(-(1 << 15), 1 << 15, (3, 32, 3), dtype=torch.int16)
    residues = torch.randint(-(1 << 31), 1 << 31, (3, 32), dtype=torch.int32)
    key = torch.arange(32, dtype=torch.uint8)
    return [
        *[_exchange(op, matrix, residues) for op in (Op.RING_LINEAR, Op.RING_MATMUL)],
        _exchange(Op.RING_LINEAR, matrix, words),
        *[_exchange(Op.RING_MASK, matrix, key, params=(10, bits, 4, 1)) for bits in (8, 16)],
    ]


def _exchange(
    op: Op,
    weight: int,
    *tensors: torch.Tensor,
    recipe: tuple[int, ...] = (),
    params: tuple[int, ...] = (),
) -> Exchange:
    specs = tuple(spec_of(tensor) for tensor in tensors)
    return Exchange(op, (weight,), (NO_BIAS,), recipe, params, specs, tensors, Priority.TRAINING)


def _placed(exchange: Exchange) -> bytes:
    """The same, with its first tensor and room for a result in an arena."""
    floats = [spec.dtype.is_floating_point for spec in exchange.specs]
    starts = tuple(4096 * n if real else INLINE for n, real in enumerate(floats))
    places = Places(starts, (Room(1 << 16, 1 << 14),))
    inline = [t for t, real in zip(exchange.tensors, floats, strict=True) if not real]
    specs = places.inline(exchange.specs)
    assert offsets(specs)[1] >= 0
    meta = pack_places(places) + pack_exchange(exchange)
    return b"".join(exchange_parts(Kind.PLACED, 7, meta, specs, tuple(inline)))


def _hellos() -> list[Good]:
    fields: list[Json] = [
        {},
        {"client": "name", "pid": 7},
        {"weight": 2.5, "deadline_ms": 20},
        {"deadline_ms": None, "key": "sk-nothing"},
        {"masked": 8},
        {"arena": True},
    ]
    return [Good(json_frame(Kind.HELLO, 0, {"protocol": 1, **each})) for each in fields]


def _requests() -> list[Good]:
    questions: list[Json] = [{"get": g} for g in ("files", "parameters", "stats", "digest", "ring")]
    questions += [{"get": "weight", "id": 1, "why": "a test"}, {"admin": "status"}]
    questions.append({"get": "memory", "devices": ["cpu"], "bytes": 1})
    return [Good(json_frame(Kind.REQUEST, 5, question)) for question in questions]


def _result_frame(result: Result) -> bytes:
    specs = tuple(spec_of(tensor) for tensor in result.tensors)
    meta = pack_result(result, specs)
    return b"".join(exchange_parts(Kind.RESULT, 1, meta, specs, result.tensors))


def _replies(base: Executor) -> list[Good]:
    client, welcome = base.attach({"protocol": 1})
    replies = [Good(json_frame(Kind.WELCOME, 0, welcome))]
    questions: list[Json] = [{"get": "files"}, {"get": "stats"}, {"get": "digest"}]
    for question in questions:
        answer, payload = base.answer(client, question)
        head = json_frame(Kind.REPLY, 1, answer, len(payload))
        replies.append(Good(head + payload.numpy().tobytes()))
    base.detach(client)
    replies.append(Good(json_frame(Kind.ERROR, 1, {"code": "invalid-input", "message": "no"})))
    return replies
