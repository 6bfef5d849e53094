"""A tenant never sees another's bytes, and neither does the log.

One client plants a pattern in everything that it sends: activations that are computed, refused,
over the limit, and cut off by its death. Every byte that another client receives meanwhile and
afterwards is searched for it, the gaps between tensors too.
"""

from __future__ import annotations

import io
import json
import logging
import re
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING

import peft
import pytest
import torch

import raw
import tiny
from bad_frames import EMBED, QUERY, REFUSED, UP, linear
from exchanges import weight_id
from raw import RawClient
from symbiosis import Executor, connect
from symbiosis.executor import ops

if TYPE_CHECKING:
    from conftest import Serve

CANARY = struct.pack("<f", 1.2345678e30)
"""As a float; twice in a row it does not come up by chance."""

HIDDEN, KEY, DOWN, HEAD = (
    32,
    "0.self_attn.k_proj.weight",
    "0.mlp.down_proj.weight",
    "lm_head.weight",
)
SLICE = 4  # a view: dim, start, end, step


def planted(num_bytes: int) -> bytes:
    return CANARY * (num_bytes // 4)


class Planter:
    """The client whose bytes must not be seen."""

    def __init__(self, base: Executor, url: str) -> None:
        self._base = base
        self._url = url
        self._client = RawClient(url)

    def plant(self) -> None:
        """In all the ways there are, with payloads of small and large sizes."""
        for rows in (1, 3, 16, 64, 250, 2000):
            self._computed(rows)
            self._refused(rows)
            self._dies(rows)

    def _computed(self, rows: int) -> None:
        meta = linear(self._base, rows)
        self._client.exchange(1, meta, planted(rows * HIDDEN * 4))
        assert self._client.receive().kind == raw.RESULT

    def _refused(self, rows: int) -> None:
        meta = raw.exchange_meta(raw.LINEAR, (4096,), (rows, HIDDEN))
        self._client.exchange(2, meta, planted(rows * HIDDEN * 4))
        assert self._client.receive().code == "unknown-weight"
        ids = raw.exchange_meta(raw.EMBEDDING, self._weight(EMBED), (rows * 8,), dtype=raw.INT32)
        self._client.exchange(3, ids, planted(rows * HIDDEN))
        assert self._client.receive().code == "invalid-input"

    def _dies(self, rows: int) -> None:
        frame = raw.frame(raw.EXCHANGE, 4, linear(self._base, rows), planted(rows * HIDDEN * 4))
        with RawClient(self._url) as dying:
            dying.send(frame[: len(frame) * 2 // 3])

    def _weight(self, name: str) -> tuple[int, ...]:
        return (weight_id(self._base, name),)

    def close(self) -> None:
        self._client.close()


def questions(base: Executor) -> Iterator[bytes]:
    """Frames of the other client, so that answers of all kinds and sizes come back."""

    def number(name: str) -> int:
        return weight_id(base, name)

    def ones(count: int) -> bytes:
        return struct.pack(f"<{count}f", *[0.5] * count)

    for rows in (1, 3, 17, 64, 250):
        x = ones(rows * HIDDEN)
        for width in (1, 3, 13):  # results that do not fill 64 bytes: there are gaps
            several = tuple(number(name) for name in (QUERY, KEY, UP))
            narrow = (SLICE, 4, 0, 0, width, 1)
            meta = raw.exchange_meta(raw.LINEAR, several, (rows, HIDDEN), recipe=narrow)
            yield raw.frame(raw.EXCHANGE, 1, meta, x)
        for name in (QUERY, UP, HEAD):
            meta = raw.exchange_meta(raw.LINEAR, (number(name),), (rows, HIDDEN))
            yield raw.frame(raw.EXCHANGE, 1, meta, x)
        meta = raw.exchange_meta(raw.MATMUL, (number(QUERY),), (rows, HIDDEN), biases=(1,))
        yield raw.frame(raw.EXCHANGE, 1, meta, x)
        ids = raw.exchange_meta(raw.EMBEDDING, (number(EMBED),), (rows,), dtype=raw.INT32)
        yield raw.frame(
            raw.EXCHANGE, 1, ids, struct.pack(f"<{rows}i", *[n % 90 for n in range(rows)])
        )
        unit = raw.exchange_meta(
            raw.CONVOLUTION,
            (number(QUERY),),
            (1, HIDDEN, rows),
            recipe=(6, 1, 2),
            params=(1, 1, 0, 1, 0, 0, 1),
        )
        yield raw.frame(raw.EXCHANGE, 1, unit, ones(HIDDEN * rows))
    for question in ("files", "parameters", "stats", "digest", "nothing"):
        yield raw.json_frame(raw.REQUEST, 1, {"get": question})
    yield raw.json_frame(raw.REQUEST, 1, {"get": "weight", "id": number(QUERY), "why": "a test"})
    for _, make in REFUSED.values():
        yield make(base)


def everything_seen(base: Executor, url: str, planter: Planter) -> bytes:
    """What another client receives while the canaries are planted."""
    seen = b""
    with RawClient(url) as other:
        for question in questions(base):
            planter.plant()
            other.send(question)
            kind, _, meta, payload = other.receive()
            seen += meta + payload
            if kind == raw.RESULT:
                check_gaps(meta, payload)
    return seen


def check_gaps(meta: bytes, payload: bytes) -> None:
    """Between two results, up to the next multiple of 64, there are zeros."""
    at, end = 12, 0
    for _ in range(meta[11]):
        ndim = meta[at + 1]
        shape = struct.unpack_from(f"<{ndim}I", meta, at + 2)
        at += 2 + 4 * ndim
        start = -(-end // 64) * 64
        assert not any(payload[end:start]), "a gap is not zeros"
        size = 4
        for dim in shape:
            size *= dim
        end = start + size
    assert end == len(payload), "a payload is larger than its tensors"


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_nobody_sees_anothers_bytes(tcp: bool, serve: Serve) -> None:
    base, url = serve(tiny.llama(), tcp=tcp)
    planter = Planter(base, url)
    seen = everything_seen(base, url, planter)
    planter.close()
    assert len(seen) > 500_000
    assert CANARY * 2 not in seen


def test_it_would_be_seen(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: an operation that leaves its result unwritten leaks, and this finds it."""

    def unwritten(*args: object) -> torch.Tensor:
        return torch.empty_like(computed(*args))  # type: ignore[arg-type]

    computed = ops._run_one
    monkeypatch.setattr(ops, "_run_one", unwritten)
    base, url = serve(tiny.llama())
    planter = Planter(base, url)
    seen = everything_seen(base, url, planter)
    planter.close()
    assert CANARY * 2 in seen


def test_pieces_are_written_whole(serve: Serve) -> None:
    """Training beside a decoder runs in pieces into one buffer: all of it is the product."""
    base, url = serve(tiny.llama(), policy="align")
    planter = Planter(base, url)
    rows = 2000
    x = torch.linspace(-1, 1, rows * HIDDEN).view(rows, HIDDEN)
    expected = x @ tiny.llama().get_parameter(f"model.layers.{UP}").T
    meta = raw.exchange_meta(raw.LINEAR, (weight_id(base, UP),), (rows, HIDDEN))
    with RawClient(url) as trainer, connect(url, priority="interactive") as decoder:
        model = decoder.model()
        for _ in range(5):
            planter.plant()
            trainer.exchange(1, meta, x.numpy().tobytes())
            model(tiny.tokens(1, 3))
            answer = trainer.receive()
            found = torch.frombuffer(bytearray(answer.payload), dtype=torch.float32)
            torch.testing.assert_close(found.view(rows, -1), expected)
    planter.close()


# Logs and figures


SECRET = 41.28125
"""In activations, as a number in any spelling; exact in every dtype."""


def test_log_and_statistics_hold_no_payload(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """Everything is logged, and things go wrong in all ways: shapes and names only."""
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    package = logging.getLogger("symbiosis")
    package.addHandler(handler)
    before, _ = package.level, package.setLevel(logging.DEBUG)
    ids = [71, 83, 59, 67]
    try:
        base, url = serve(tiny.llama())
        with connect(url, name="somebody", verify=0.5) as session:
            model = session.model()
            model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)
            lora = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
            lora(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss.backward()
            torch.nn.functional.linear(torch.full((3, HIDDEN), SECRET), model.lm_head.weight)
            session.fetch(weight_id(base, QUERY), "a test")
            figures = json.dumps(session.executor_stats()) + repr(session.stats()) + repr(session)
        with RawClient(url) as client:
            for _, make in REFUSED.values():
                client.send(make(base))
                figures += client.receive().meta.decode(errors="replace")
            client.exchange(1, linear(base), struct.pack("<64f", *[SECRET] * 64)[:-4] + b"junk")
            client.receive()
            client.send(raw.frame(raw.EXCHANGE, 1, linear(base), struct.pack("<3f", *[SECRET] * 3)))
            client.hung_up()
    finally:
        package.removeHandler(handler)
        package.setLevel(before)
    written = out.getvalue() + figures
    assert "somebody" in written
    assert "learned" in out.getvalue(), "debug messages were not logged"
    for spelling in ("41.28", struct.pack("<f", SECRET).hex(), repr(ids)[1:-1], "71, 83"):
        assert spelling not in written, spelling
    assert not re.search(r"tensor\(", written)
