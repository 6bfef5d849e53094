"""Clients that share memory with an executor: honest ones, broken ones, and ones that vanish."""

from __future__ import annotations

import fcntl
import gc
import json
import mmap
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import raw
import tiny
from exchanges import weight_id
from raw import RawClient
from symbiosis import Executor, connect
from symbiosis.wire.exchange import NO_BIAS, Op

pytestmark = pytest.mark.timeout(60)

PLACED = 8
INLINE = 2**64 - 1
SIZE = 1 << 20
ROWS = 16
UP = "0.mlp.up_proj.weight"
X_BYTES, Y_BYTES = ROWS * 32 * 4, ROWS * 64 * 4


def memfd(size: int = SIZE, seals: int = fcntl.F_SEAL_SHRINK) -> int:
    descriptor = os.memfd_create("test-arena", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(descriptor, size)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


class SharingClient(RawClient):
    """Hands over a memfd with its HELLO."""

    def __init__(self, url: str, descriptor: int | None = None) -> None:
        super().__init__(url, greet=False)
        self.descriptor = memfd() if descriptor is None else descriptor
        socket.send_fds(self.socket, [raw.hello(arena=True)], [self.descriptor])
        welcome = json.loads(self.receive().meta)
        self.session, self.arena = welcome["session"], welcome["arena"]
        self.memory = mmap.mmap(self.descriptor, SIZE) if self.arena is True else None

    def placed(
        self, request: int, executor: Executor, inputs: list[int], rooms: list[tuple[int, int]]
    ) -> None:
        self.send(raw.frame(PLACED, request, places(inputs, rooms) + linear(executor)))

    def close(self) -> None:
        super().close()
        os.close(self.descriptor)
        if self.memory is not None:
            self.memory.close()


def places(inputs: list[int], rooms: list[tuple[int, int]]) -> bytes:
    numbers = inputs + [number for room in rooms for number in room]
    return struct.pack(f"<BB{len(numbers)}Q", len(inputs), len(rooms), *numbers)


def linear(executor: Executor, **fields: object) -> bytes:
    weights = (weight_id(executor, UP),)
    return raw.exchange_meta(raw.LINEAR, weights, (ROWS, 32), **fields)  # type: ignore[arg-type]


def check_healthy(executor: Executor, url: str) -> None:
    """Large enough to go through the arena."""
    x = torch.randn(400, 32)
    with connect(url) as session:
        for _ in range(3):
            found = session.product(
                Op.LINEAR, x, weight_id(executor, UP), (), NO_BIAS, forward=True
            )
            assert torch.equal(found, F.linear(x, weight(executor)))


def weight(executor: Executor) -> torch.Tensor:
    return executor.weights[weight_id(executor, UP)].tensor


def held() -> tuple[int, int]:
    """Descriptors, and mappings of shared memory, of this process: the executor's."""
    maps = Path("/proc/self/maps").read_text().count("/memfd:")
    return len(os.listdir("/proc/self/fd")), maps


@pytest.fixture(autouse=True)
def nothing_left(executor: Executor, base_url: str) -> Iterator[None]:
    """Others are served, and descriptors and mappings return to what they were."""
    check_healthy(executor, base_url)
    settle(base_url, 1)
    before = held()
    yield
    check_healthy(executor, base_url)
    settle(base_url, 1)
    if held() != before:
        gc.collect()
    assert held() == before


def settle(url: str, clients: int) -> None:
    """Until the executor has noticed who left."""
    with connect(url, arena_bytes=0) as session:
        deadline_s = time.monotonic() + 20
        while len(session.executor_stats()["clients"]) > clients:
            assert time.monotonic() < deadline_s
    time.sleep(0.05)  # that session's own end


def test_input_and_result_in_the_arena(executor: Executor, base_url: str) -> None:
    with SharingClient(base_url) as client:
        assert client.memory is not None
        x = torch.randn(ROWS, 32)
        client.memory[:X_BYTES] = x.numpy().tobytes()
        client.placed(1, executor, [0], [(8192, Y_BYTES)])
        answer = client.receive()
        assert (answer.kind, answer.request, answer.payload) == (raw.RESULT, 1, b"")
        y = torch.frombuffer(
            bytearray(client.memory[8192 : 8192 + Y_BYTES]), dtype=torch.float32
        ).view(ROWS, 64)
        assert torch.equal(y, F.linear(x, weight(executor)))


@pytest.mark.parametrize("rooms", [[], [(8192, 0)], [(8192, Y_BYTES - 4)]])
def test_a_result_without_room_comes_in_the_payload(
    executor: Executor, base_url: str, rooms: list[tuple[int, int]]
) -> None:
    with SharingClient(base_url) as client:
        client.placed(1, executor, [0], rooms)
        assert client.receive().payload == bytes(Y_BYTES)


BROKEN: dict[str, tuple[list[int], list[tuple[int, int]]]] = {
    "input out of bounds": ([SIZE], []),
    "input beyond 2^63": ([2**64 - 64], []),
    "input reaching out": ([SIZE - X_BYTES + 64], []),
    "input not aligned": ([4], []),
    "result out of bounds": ([0], [(SIZE - 64, 128)]),
    "result of any size": ([0], [(8192, 2**64 - 1)]),
    "result not aligned": ([0], [(8193, Y_BYTES)]),
    "input and result overlap": ([0], [(X_BYTES - 64, Y_BYTES)]),
    "results overlap": ([0], [(8192, Y_BYTES), (8192, Y_BYTES)]),
    "too few places": ([], []),
    "too many places": ([0, 8192], []),
    "input nowhere": ([INLINE], []),
}


@pytest.mark.parametrize("case", BROKEN)
def test_places_that_make_no_sense_end_the_connection(
    executor: Executor, base_url: str, case: str
) -> None:
    with SharingClient(base_url) as client:
        client.placed(1, executor, *BROKEN[case])
        answer = client.receive()
        assert (answer.code, answer.request) == ("protocol", 0)
        assert client.hung_up()


def test_token_ids_in_the_arena_end_the_connection(executor: Executor, base_url: str) -> None:
    """They are checked, and a client could change them afterwards."""
    meta = raw.exchange_meta(
        raw.EMBEDDING, (weight_id(executor, "embed_tokens.weight"),), (8,), dtype=raw.INT64
    )
    with SharingClient(base_url) as client:
        client.send(raw.frame(PLACED, 1, places([0], []) + meta))
        answer = client.receive()
        assert "integers travel" in json.loads(answer.meta)["message"]
        assert client.hung_up()


def test_places_without_an_arena_end_the_connection(executor: Executor, base_url: str) -> None:
    with RawClient(base_url) as client:
        client.send(raw.frame(PLACED, 1, places([0], []) + linear(executor)))
        assert "no arena is attached" in json.loads(client.receive().meta)["message"]
        assert client.hung_up()


def test_a_refused_exchange_leaves_the_arena_usable(executor: Executor, base_url: str) -> None:
    unknown = raw.exchange_meta(raw.LINEAR, (4096,), (ROWS, 32))
    with SharingClient(base_url) as client:
        client.send(raw.frame(PLACED, 1, places([0], [(8192, Y_BYTES)]) + unknown))
        assert client.receive().code == "unknown-weight"
        client.placed(2, executor, [0], [(8192, Y_BYTES)])
        assert client.receive().request == 2


REFUSED: dict[str, tuple[Callable[[], int], str]] = {
    "unsealed": (lambda: memfd(seals=0), "not sealed"),
    "too large": (lambda: memfd(1 << 40), "an arena has"),
    "no memfd": (lambda: os.open("/dev/null", os.O_RDWR), "not that of a memfd"),
    "read only": (lambda: memfd(seals=fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE), "not permitted"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_unfit_descriptor_is_refused_and_the_session_goes_on(
    executor: Executor, base_url: str, case: str
) -> None:
    make, told = REFUSED[case]
    with SharingClient(base_url, make()) as client:
        assert told in client.arena
        client.exchange(1, linear(executor), bytes(X_BYTES))
        assert client.receive().payload == bytes(Y_BYTES)


def _announced_only(url: str) -> RawClient:
    client = RawClient(url, greet=False)
    client.send(raw.hello(arena=True))
    return client


def _sent_only(url: str) -> RawClient:
    client, descriptor = RawClient(url, greet=False), memfd()
    socket.send_fds(client.socket, [raw.hello()], [descriptor])
    os.close(descriptor)
    return client


def _several(url: str) -> RawClient:
    client, descriptor = RawClient(url, greet=False), memfd()
    socket.send_fds(client.socket, [raw.hello(arena=True)], [descriptor] * 3)
    os.close(descriptor)
    return client


def _one_after_another(url: str) -> RawClient:
    client, descriptor = RawClient(url, greet=False), memfd()
    for byte in (b"S", b"Y"):
        socket.send_fds(client.socket, [byte], [descriptor])
    os.close(descriptor)
    return client


@pytest.mark.parametrize("greet", [_announced_only, _sent_only, _several, _one_after_another])
def test_descriptors_that_make_no_sense_end_the_connection(
    base_url: str, greet: Callable[[str], RawClient]
) -> None:
    with greet(base_url) as client:
        assert client.receive().code == "protocol"
        assert client.hung_up()


def test_an_arena_over_tcp_is_refused() -> None:
    with Executor.of(tiny.llama()) as executor:
        (url,) = executor.listen(["tcp://127.0.0.1:0"])
        with _announced_only(url) as client:
            assert client.receive().code == "protocol"
            assert client.hung_up()


def test_descriptors_after_hello_are_dropped(executor: Executor, base_url: str) -> None:
    with SharingClient(base_url) as client:
        before = held()
        for request in range(20):
            meta = raw.frame(raw.EXCHANGE, request, linear(executor), bytes(X_BYTES))
            socket.send_fds(client.socket, [meta], [client.descriptor] * 3)
            assert client.receive().request == request
        assert held() == before


def test_hanging_up_with_a_descriptor_under_way(base_url: str) -> None:
    for kept in (1, 23, 30):
        client, descriptor = RawClient(base_url, greet=False), memfd()
        socket.send_fds(client.socket, [raw.hello(arena=True)[:kept]], [descriptor])
        os.close(descriptor)
        client.close()


def test_vanishing_with_exchanges_in_flight(executor: Executor, base_url: str) -> None:
    for _ in range(5):
        with SharingClient(base_url) as client:
            for request in range(40):
                client.placed(request, executor, [0], [(8192, Y_BYTES)])


_WORK = """
import sys, torch, symbiosis
session = symbiosis.connect(sys.argv[1])
model = session.model()
ids = torch.randint(3, 96, (16, 64))
print("up", flush=True)
while True:
    model(ids)
"""


def test_a_process_killed_in_mid_exchange(executor: Executor, base_url: str) -> None:
    """Its mapping goes when its last exchange is done."""
    process = subprocess.Popen(
        [sys.executable, "-c", _WORK, base_url], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout as out:
        assert out.readline() == "up\n"
        time.sleep(0.2)
        check_healthy(executor, base_url)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
    settle(base_url, 1)


def test_two_clients_in_one_batch(executor: Executor, base_url: str) -> None:
    """Rows are joined out of two arenas, and each gets its own back."""
    with SharingClient(base_url) as ann, SharingClient(base_url) as bob:
        largest = 0
        for turn in range(50):
            for number, client in enumerate((ann, bob)):
                assert client.memory is not None
                x = torch.full((ROWS, 32), float(number + turn))
                client.memory[:X_BYTES] = x.numpy().tobytes()
                client.placed(turn, executor, [0], [(8192, Y_BYTES)])
            for number, client in enumerate((ann, bob)):
                largest = max(largest, struct.unpack_from("<IIH", client.receive().meta)[2])
                assert client.memory is not None
                data = bytearray(client.memory[8192 : 8192 + Y_BYTES])
                y = torch.frombuffer(data, dtype=torch.float32).view(ROWS, 64)
                x = torch.full((ROWS, 32), float(number + turn))
                torch.testing.assert_close(y, F.linear(x, weight(executor)))
        assert largest <= 2
