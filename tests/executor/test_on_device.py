"""Clients whose activations go through the memory of the executor's device; the CPU stands in for
the GPU, a file in shared memory for its IPC. All else is as it is there."""

from __future__ import annotations

import json
import logging
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

import raw
import tiny
from exchanges import weight_id
from raw import RawClient
from symbiosis import Executor, Session, connect
from symbiosis.executor import keystore
from symbiosis.executor.connection import Connection, Fitted
from symbiosis.transport import device_memory
from symbiosis.transport.device_arena import DeviceBlocks, blocks_of
from symbiosis.wire.exchange import NO_BIAS, Op
from symbiosis.wire.frames import Kind

pytestmark = pytest.mark.timeout(60)

Serve = Callable[..., tuple[Executor, str]]

ON_DEVICE = 9
UP = "0.mlp.up_proj.weight"
ROWS = 16
MIB = 1 << 20


@pytest.fixture(autouse=True)
def exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device of 512 MiB, of which an eighth is for clients."""
    monkeypatch.setattr(device_memory, "EXCHANGED", ("cpu",))
    monkeypatch.setattr(device_memory, "total_bytes", lambda device: 512 * MIB)
    blocks_of.cache_clear()


@pytest.fixture
def frames(monkeypatch: pytest.MonkeyPatch) -> list[Kind]:
    """The kinds of all exchanges that arrive."""
    found: list[Kind] = []
    fit = Connection._fit_exchange

    def watched(self: Connection, kind: Kind, meta: bytes, payload_bytes: int) -> Fitted:
        found.append(kind)
        return fit(self, kind, meta, payload_bytes)

    monkeypatch.setattr(Connection, "_fit_exchange", watched)
    return found


def product(session: Session, executor: Executor, x: torch.Tensor) -> torch.Tensor:
    return session.product(Op.LINEAR, x, weight_id(executor, UP), (), NO_BIAS, forward=True)


def weight(executor: Executor) -> torch.Tensor:
    return executor.weights[weight_id(executor, UP)].tensor


def blocks() -> DeviceBlocks:
    return blocks_of(torch.device("cpu"))


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2, tiny.mixtral, tiny.llama_with_biases])
def test_training_is_the_same_bit_for_bit_and_crosses_no_socket(
    serve: Serve, frames: list[Kind], build: Callable[[], PreTrainedModel]
) -> None:
    _, url = serve(build())
    local = build().requires_grad_(False)
    ids = tiny.tokens(2, 12)
    with connect(url) as session:
        model = session.model().eval()
        for _ in range(3):  # the first time results have no room
            frames.clear()
            for ours, theirs in zip(tiny.step(model, ids), tiny.step(local, ids), strict=True):
                assert torch.equal(ours, theirs)
        assert set(frames) == {Kind.ON_DEVICE}
        (client,) = session.executor_stats()["clients"].values()
        assert client["bytes_out"] < session.stats().bytes_received


def test_tokens_are_the_same(serve: Serve, frames: list[Kind]) -> None:
    _, url = serve(tiny.llama())
    ids = tiny.tokens(1, 5)
    with connect(url) as session:
        found = session.model().generate(ids, max_new_tokens=20, do_sample=False)
    assert torch.equal(found, tiny.llama().generate(ids, max_new_tokens=20, do_sample=False))
    assert frames.count(Kind.ON_DEVICE) > len(frames) / 2


def test_a_larger_exchange_gets_a_larger_block(serve: Serve, frames: list[Kind]) -> None:
    executor, url = serve(tiny.llama())
    small, large = torch.randn(100, 32), torch.randn(60_000, 32)  # 22 MiB with the result
    with connect(url) as session:
        for x in (small, small, large, large, small):
            assert torch.equal(product(session, executor, x), F.linear(x, weight(executor)))
        assert frames == [Kind.ON_DEVICE] * 5
        assert [len(block.memory) for block in blocks()._free] == [16 * MIB]
    with connect(url) as session:  # gets what the other had
        product(session, executor, small)
        product(session, executor, large)
        assert blocks().all_bytes == (16 + 32) * MIB


def test_more_than_there_is_goes_through_the_host(
    serve: Serve, frames: list[Kind], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "symbiosis")
    executor, url = serve(tiny.llama())
    small, middle, large = (torch.randn(n, 32) for n in (100, 60_000, 400_000))
    with connect(url) as session:
        for x in (small, large, large, small, middle):
            assert torch.equal(product(session, executor, x), F.linear(x, weight(executor)))
    assert frames == [Kind.ON_DEVICE, Kind.PLACED, Kind.PLACED, Kind.ON_DEVICE, Kind.ON_DEVICE]
    assert caplog.text.count("they go through the host's memory") == 1
    assert "an exchange may have 67108864 bytes" in caplog.text


def test_a_client_that_sees_no_such_device(
    serve: Serve, frames: list[Kind], monkeypatch: pytest.MonkeyPatch
) -> None:
    executor, url = serve(tiny.llama())
    monkeypatch.setattr(device_memory, "devices_like", lambda device: {"another": device})
    x = torch.randn(100, 32)
    with connect(url) as session:
        for _ in range(3):
            product(session, executor, x)
    assert frames == [Kind.EXCHANGE] * 3


def test_memory_that_cannot_be_attached(
    serve: Serve, frames: list[Kind], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another container, say."""

    def refuse(shared: object, device: torch.device) -> torch.Tensor:
        raise RuntimeError("CUDA error: invalid device context")

    executor, url = serve(tiny.llama())
    monkeypatch.setattr(device_memory, "attach", refuse)
    x = torch.randn(1000, 32)
    with connect(url) as session:
        for _ in range(3):
            assert torch.equal(product(session, executor, x), F.linear(x, weight(executor)))
        assert len(blocks()._free) == 1  # for others
    assert frames == [Kind.PLACED] * 3


def test_devices_that_cannot_be_told(
    serve: Serve, frames: list[Kind], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(device: torch.device) -> dict[str, torch.device]:
        raise RuntimeError("CUDA error: device unavailable")

    executor, url = serve(tiny.llama())
    monkeypatch.setattr(device_memory, "devices_like", refuse)
    with connect(url) as session:
        product(session, executor, torch.randn(100, 32))
    assert frames == [Kind.EXCHANGE]


def test_who_is_put_out_may_not_know_yet(tmp_path: Path) -> None:
    """Its next exchange is copied into its block before it hears of it: that is nobody else's."""
    url, admin = f"unix://{tmp_path}/base.sock", f"unix://{tmp_path}/admin.sock"
    x = torch.randn(100, 32)
    with Executor.of(tiny.llama()) as executor:
        executor.listen([url], admin=admin)
        with connect(url, retry_s=10) as ann, connect(url) as bob, RawClient(admin) as operator:
            before = product(ann, executor, x)
            first, _ = sorted(executor._engine.stats.clients)
            operator.send(raw.json_frame(raw.REQUEST, 1, {"admin": "disconnect", "client": first}))
            assert operator.receive().kind == raw.REPLY
            product(bob, executor, x)
            assert len(blocks()._all) == 2
            assert torch.equal(product(ann, executor, x), before)
            assert len(blocks()._all) == 3
        assert len(blocks()._free) < 3


def test_a_client_lets_go_when_its_copies_are_done(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor, url = serve(tiny.llama())
    session = connect(url)
    product(session, executor, torch.randn(100, 32))
    connected: list[int] = []

    def waited(device: torch.device) -> None:
        connected.append(len(executor._engine.stats.clients))
        time.sleep(0.05)

    monkeypatch.setattr(device_memory, "wait_for_all", waited)
    session.close()
    assert connected == [1]


def test_not_among_tenants(serve: Serve, frames: list[Kind], tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    secret, _ = keystore.create(keys, "ann")
    executor, url = serve(tiny.llama(), keys=keys)
    x = torch.randn(1000, 32)
    with connect(url, key=secret) as session:
        assert torch.equal(product(session, executor, x), F.linear(x, weight(executor)))
    assert frames == [Kind.PLACED]


def test_not_over_the_network(serve: Serve, frames: list[Kind]) -> None:
    executor, url = serve(tiny.llama(), tcp=True)
    with connect(url) as session:
        product(session, executor, torch.randn(100, 32))
    with RawClient(url) as client:
        assert ask(client).code == "request-refused"
    assert frames == [Kind.EXCHANGE]


def test_without_shared_memory_there_is_none_of_a_device(serve: Serve, frames: list[Kind]) -> None:
    executor, url = serve(tiny.llama())
    with connect(url, arena_bytes=0) as session:
        product(session, executor, torch.randn(100, 32))
    assert frames == [Kind.EXCHANGE]


def test_a_new_executor_gives_a_new_block(tmp_path: Path, frames: list[Kind]) -> None:
    url = f"unix://{tmp_path}/base.sock"
    x = torch.randn(100, 32)
    with Executor.of(tiny.llama()) as executor:
        executor.listen([url])
        session = connect(url, retry_s=10)
        before = product(session, executor, x)
    with Executor.of(tiny.llama()) as executor, session:
        executor.listen([url])
        assert torch.equal(product(session, executor, x), before)
        assert blocks().all_bytes == 32 * MIB  # the client could not know that it lost the first
    assert set(frames) == {Kind.ON_DEVICE}


# Clients that speak bytes


def question(request: int, **fields: object) -> bytes:
    wanted = {"get": "memory", "devices": ["cpu"], "bytes": 1, **fields}
    return raw.json_frame(raw.REQUEST, request, wanted)


def ask(client: RawClient, **fields: object) -> raw.Answer:
    client.send(question(1, **fields))
    return client.receive()


def linear(executor: Executor) -> bytes:
    return raw.exchange_meta(raw.LINEAR, (weight_id(executor, UP),), (ROWS, 32))


def placed(executor: Executor, request: int, start: int, room: int) -> bytes:
    places = struct.pack("<BB3Q", 1, 1, start, room, ROWS * 64 * 4)
    return raw.frame(ON_DEVICE, request, places + linear(executor))


def test_as_the_protocol_says(executor: Executor, base_url: str) -> None:
    x = torch.randn(ROWS, 32)
    with RawClient(base_url) as client:
        told = json.loads(ask(client).meta)
        assert told["device"] == "cpu"
        block = device_memory.attach(told, torch.device("cpu"))
        block[: x.nbytes] = x.flatten().view(torch.uint8)
        client.send(placed(executor, 2, 0, 8192))
        answer = client.receive()
        assert (answer.kind, answer.request, answer.payload) == (raw.RESULT, 2, b"")
        y = block[8192 : 8192 + ROWS * 64 * 4].view(torch.float32).view(ROWS, 64)
        assert torch.equal(y, F.linear(x, weight(executor)))


@pytest.mark.parametrize(
    "fields",
    [
        {"devices": "cpu"}, {"devices": ["GPU-0"]}, {"devices": [["cpu"]]}, {"bytes": None},
        {"bytes": -1}, {"bytes": True}, {"bytes": "1"}, {"bytes": 1e9},
    ],
)  # fmt: skip
def test_what_is_asked_for_wrongly_is_refused(
    executor: Executor, base_url: str, fields: dict[str, object]
) -> None:
    with RawClient(base_url) as client:
        assert ask(client, **fields).code == "request-refused"
        assert ask(client).kind == raw.REPLY


def test_more_than_there_is(executor: Executor, base_url: str) -> None:
    with RawClient(base_url) as client:
        for much in (65 * MIB, 1 << 80, 10**4000):
            assert ask(client, bytes=much).code == "quota-exceeded"


def test_a_block_is_given_back(executor: Executor, base_url: str) -> None:
    with RawClient(base_url) as client:
        ask(client)
        assert json.loads(ask(client, devices=[], bytes=0).meta) == {"device": None}
        assert len(blocks()._free) == 1
        client.send(placed(executor, 1, 0, 8192))
        assert client.hung_up()


def test_an_operator_computes_nothing(serve: Serve, tmp_path: Path) -> None:
    with Executor.of(tiny.llama()) as executor:
        admin = f"unix://{tmp_path}/admin.sock"
        executor.listen([f"unix://{tmp_path}/other.sock"], admin=admin)
        with RawClient(admin) as client:
            assert ask(client).code == "protocol"


def test_no_block_no_exchange_in_it(executor: Executor, base_url: str) -> None:
    with RawClient(base_url) as client:
        client.send(placed(executor, 1, 0, 8192))
        assert client.receive().code == "protocol"
        assert client.hung_up()


@pytest.mark.parametrize(("start", "room"), [(16 * MIB, 0), (0, 16 * MIB - 64), (4, 8192), (0, 64)])
def test_places_that_make_no_sense_end_the_connection(
    executor: Executor, base_url: str, start: int, room: int
) -> None:
    with RawClient(base_url) as client:
        ask(client)
        client.send(placed(executor, 2, start, room))
        assert client.receive().code == "protocol"
        assert client.hung_up()


def test_not_while_an_exchange_is_under_way(executor: Executor, base_url: str) -> None:
    """It could lie in the memory that the next client gets."""
    exchange = raw.frame(raw.EXCHANGE, 1, linear(executor), bytes(ROWS * 32 * 4))
    with RawClient(base_url) as client:
        client.send(exchange + question(2))
        answers = {answer.request: answer for answer in (client.receive(), client.receive())}
        assert answers[1].kind == raw.RESULT
        assert answers[2].code == "request-refused"
    with RawClient(base_url) as client:
        assert ask(client).kind == raw.REPLY


def test_a_client_that_is_killed_leaves_its_block_to_the_next(
    executor: Executor, base_url: str
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _WORK, base_url], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout as out:
        assert out.readline() == "up\n"
        time.sleep(0.1)
        assert len(blocks()._free) == 0
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
    deadline_s = time.monotonic() + 20
    while not blocks()._free:
        assert time.monotonic() < deadline_s
    x = torch.randn(100, 32)
    with connect(base_url) as session:
        assert torch.equal(product(session, executor, x), F.linear(x, weight(executor)))
        assert blocks().all_bytes == 16 * MIB


_WORK = """
import sys, torch, symbiosis
from symbiosis.transport import device_memory
device_memory.EXCHANGED = ("cpu",)
with symbiosis.connect(sys.argv[1]) as session:
    model = session.model()
    ids = torch.randint(3, 96, (2, 8))
    model(ids)
    print("up", flush=True)
    while True:
        model(ids)
"""
