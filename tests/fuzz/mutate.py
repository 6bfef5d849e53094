"""Mutations of frames: blind ones, and ones that know where lengths, dimensions and JSON are.

Own mutations and no fuzzing library: they have to keep lengths consistent to get past the first
check, and a seed is all that is needed to make one again.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable

import torch

from fuzz.corpus import Good
from symbiosis.wire.exchange import Exchange, pack_exchange
from symbiosis.wire.frames import HEADER, Kind
from symbiosis.wire.tensors import TensorSpec, offsets

_NUMBERS = [
    0, 1, 2, 3, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256, 65535, 65536, 65537,
    (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 1 << 24, 1 << 30, (1 << 31) - 1, 1 << 31,
    (1 << 32) - 1, 1 << 32, (1 << 48) + 1, (1 << 62), (1 << 63) - 1, 1 << 63, (1 << 64) - 1,
]  # fmt: skip
_SIGNED = [*[n for n in _NUMBERS if n < 1 << 63], -1, -2, -3, -4, -32, -33, -(1 << 31), -(1 << 63)]
_ODD: list[object] = [
    None, True, False, 0, -1, 1e308, float("nan"), float("inf"), 10**30, "", "x" * 5000, "\0", "é",
    [], {}, [[[[]]]], {"a": {"b": [1]}}, [1, "2", None], "get", "__class__", -0.0, 1 << 63,
]  # fmt: skip

Mutation = Callable[[random.Random, Good, Good], bytes]


def mutated(chance: random.Random, good: Good, other: Good) -> bytes:
    """One frame that is probably wrong, made of ``good`` and perhaps a part of ``other``."""
    choices = _ANY if good.exchange is None else _ANY + 2 * _OF_EXCHANGES
    if good.frame[3] in (Kind.HELLO, Kind.REQUEST, Kind.WELCOME, Kind.REPLY, Kind.ERROR):
        choices = _ANY + 3 * [_other_json]
    frame = chance.choice(choices)(chance, good, other)
    if chance.random() < 0.15:
        frame = _flip_bits(chance, Good(frame), other)
    return frame


def _parts(frame: bytes) -> tuple[list[int], bytes, bytes]:
    """Header fields, meta section, payload; of a good frame."""
    fields = list(HEADER.unpack_from(frame))
    end = HEADER.size + fields[3]
    return fields, frame[HEADER.size : end], frame[end:]


def _joined(fields: list[int], meta: bytes, payload: bytes) -> bytes:
    """With lengths that are right."""
    fields = [*fields[:3], len(meta), fields[4], len(payload)]
    return HEADER.pack(*fields) + meta + payload


def _flip_bits(chance: random.Random, good: Good, other: Good) -> bytes:
    data = bytearray(good.frame)
    for _ in range(chance.choice((1, 1, 1, 2, 8))):
        if data:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


def _flip_in_meta(chance: random.Random, good: Good, other: Good) -> bytes:
    fields, meta, payload = _parts(good.frame)
    return _joined(fields, _flip_bits(chance, Good(meta), other), payload)


def _truncate(chance: random.Random, good: Good, other: Good) -> bytes:
    return good.frame[: chance.randrange(1, len(good.frame))]


def _duplicate(chance: random.Random, good: Good, other: Good) -> bytes:
    a, b = sorted(chance.randrange(len(good.frame) + 1) for _ in range(2))
    return good.frame[:b] + good.frame[a:]


def _cut_out(chance: random.Random, good: Good, other: Good) -> bytes:
    fields, meta, payload = _parts(good.frame)
    a, b = sorted(chance.randrange(len(meta) + 1) for _ in range(2))
    return _joined(fields, meta[:a] + meta[b:], payload)


def _lie_about_length(chance: random.Random, good: Good, other: Good) -> bytes:
    fields, meta, payload = _parts(good.frame)
    which, bits = chance.choice(((3, 32), (5, 64)))
    near = fields[which] + chance.choice((-65, -64, -1, 1, 64))
    fields[which] = chance.choice([*_NUMBERS, near, near, near]) % (1 << bits)
    return HEADER.pack(*fields) + meta + payload


def _other_kind(chance: random.Random, good: Good, other: Good) -> bytes:
    fields, meta, payload = _parts(good.frame)
    fields[2] = chance.choice([*range(12), 127, 128, 129, 133, 136, 255])
    fields[4] = chance.choice(_NUMBERS)
    return HEADER.pack(*fields) + meta + payload


def _overwrite(chance: random.Random, good: Good, other: Good) -> bytes:
    """A number of four or eight bytes somewhere in the meta section."""
    fields, meta, payload = _parts(good.frame)
    size, form = chance.choice(((1, "<B"), (2, "<H"), (4, "<I"), (8, "<Q")))
    if len(meta) < size:
        return good.frame
    at = chance.randrange(len(meta) - size + 1)
    value = struct.pack(form, chance.choice(_NUMBERS) % (1 << (8 * size)))
    return _joined(fields, meta[:at] + value + meta[at + size :], payload)


def _splice(chance: random.Random, good: Good, other: Good) -> bytes:
    fields, meta, payload = _parts(good.frame)
    _, more, rest = _parts(other.frame)
    a, b = chance.randrange(len(meta) + 1), chance.randrange(len(more) + 1)
    return _joined(fields, meta[:a] + more[b:], chance.choice((payload, rest)))


def _two_at_once(chance: random.Random, good: Good, other: Good) -> bytes:
    return good.frame + other.frame[: chance.randrange(len(other.frame) + 1)]


def _noise(chance: random.Random, good: Good, other: Good) -> bytes:
    fields, _, payload = _parts(good.frame)
    return _joined(fields, chance.randbytes(chance.randrange(200)), payload)


def _other_json(chance: random.Random, good: Good, other: Good) -> bytes:
    """A value, a key or the whole replaced."""
    fields, meta, payload = _parts(good.frame)
    value = json.loads(meta)
    if chance.random() < 0.1:
        value = chance.choice(_ODD)
    else:
        key = chance.choice([*value, "get", "key", "masked", "arena", "weights", "id", "digest"])
        value[key] = chance.choice(_ODD)
    text = json.dumps(value).encode()
    if chance.random() < 0.1:
        text = chance.choice((b"[" * 9000, b'{"a":' * 9000, b"\xff\xfe", b"nan", text + b"x"))
    return _joined(fields, text, payload)


def _other_fields(chance: random.Random, good: Good, other: Good) -> bytes:
    """An exchange that is well-formed and means something else."""
    assert good.exchange is not None
    changed = good.exchange
    for _ in range(chance.choice((1, 1, 2, 3))):
        changed = chance.choice(_FIELDS)(chance, changed)
    return _written(changed, good, chance)


def _written(changed: Exchange, good: Good, chance: random.Random) -> bytes:
    fields, meta, payload = _parts(good.frame)
    try:
        meta = pack_exchange(changed)
    except Exception:  # noqa: BLE001 - it cannot even be written down
        return good.frame
    needed = offsets(changed.specs)[1]
    if needed <= 1 << 16:
        payload = (payload * (1 + needed // max(1, len(payload))))[:needed].ljust(needed, b"\1")
    elif chance.random() < 0.5:  # a length that agrees with the description, and no such bytes
        fields = [*fields[:3], len(meta), fields[4], min(needed, (1 << 64) - 1)]
        return HEADER.pack(*fields) + meta + payload
    return _joined(fields, meta, payload)


def _dims(chance: random.Random, e: Exchange) -> Exchange:
    if not e.specs:
        return e
    specs = list(e.specs)
    at = chance.randrange(len(specs))
    shape = list(specs[at].shape)
    action = chance.randrange(4)
    number = chance.choice(_NUMBERS) % (1 << 32)
    if action == 0 and shape:
        shape[chance.randrange(len(shape))] = number
    elif action == 1:
        shape.insert(chance.randrange(len(shape) + 1), chance.choice((0, 1, 2, number)))
    elif shape:
        shape.pop(chance.randrange(len(shape)))
    specs[at] = TensorSpec(specs[at].dtype, tuple(shape[:8]))
    return e._replace(specs=tuple(specs))


def _dtypes(chance: random.Random, e: Exchange) -> Exchange:
    dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32]
    dtypes += [torch.int64, torch.uint8, torch.int8, torch.bool, torch.int16]
    specs = [TensorSpec(chance.choice((s.dtype, chance.choice(dtypes))), s.shape) for s in e.specs]
    return e._replace(specs=tuple(specs))


def _how_many(chance: random.Random, e: Exchange) -> Exchange:
    specs = chance.choice((e.specs[:-1], e.specs * 2, e.specs * 20, ()))
    return e._replace(specs=specs[:250])


def _recipes(chance: random.Random, e: Exchange) -> Exchange:
    recipe = list(e.recipe)
    for _ in range(chance.randrange(1, 4)):
        count = chance.choice((0, 1, 1, 2, 2, 3, 4))
        step = chance.choice((*range(11), chance.choice(_SIGNED)))
        recipe += [step, chance.choice((count, count, count, chance.choice(_SIGNED)))]
        recipe += [chance.choice((0, 1, 2, -1, chance.choice(_SIGNED))) for _ in range(count)]
    return e._replace(recipe=tuple(recipe[:250]))


def _params(chance: random.Random, e: Exchange) -> Exchange:
    params = list(e.params)
    for _ in range(chance.choice((1, 1, 2, 5))):
        small = chance.randrange(-4, 40)
        value = chance.choice((small, small, chance.choice(_SIGNED)))
        if params and chance.random() < 0.7:
            params[chance.randrange(len(params))] = value
        elif params and chance.random() < 0.3:
            params.pop(chance.randrange(len(params)))
        else:
            params.append(value)
    return e._replace(params=tuple(params))


def _weights(chance: random.Random, e: Exchange) -> Exchange:
    def one() -> int:
        return chance.choice((*range(30), chance.choice(_NUMBERS) % (1 << 32)))

    count = chance.choice((1, 1, 2, 3, 40))
    weights = tuple(one() for _ in range(count))
    biases = tuple(chance.choice((0, one())) for _ in range(count))
    return e._replace(weights=weights, biases=biases)


def _ops(chance: random.Random, e: Exchange) -> Exchange:
    return e._replace(op=chance.choice((*range(16), 200, 255)))


_FIELDS = [_dims, _dims, _dtypes, _how_many, _recipes, _recipes, _params, _params, _weights, _ops]
_OF_EXCHANGES: list[Mutation] = [_other_fields] * 4
_ANY: list[Mutation] = [
    _flip_bits, _flip_in_meta, _truncate, _duplicate, _cut_out, _lie_about_length, _other_kind,
    _overwrite, _overwrite, _splice, _two_at_once, _noise,
]  # fmt: skip
