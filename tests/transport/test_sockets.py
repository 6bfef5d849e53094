"""Addresses, listening, and a client's connection to what is no executor."""

from __future__ import annotations

import os
import socket
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from symbiosis import Executor, connect
from symbiosis.errors import ConnectionFailed, ConnectionLost, ProtocolError
from symbiosis.transport.addresses import DEFAULT_TCP_PORT, Address, listen
from symbiosis.transport.sockets import SocketChannel
from symbiosis.wire.frames import VERSION

# Addresses


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("unix:///tmp/a.sock", Address("/tmp/a.sock", "", 0)),
        ("unix:///a b/ü.sock", Address("/a b/ü.sock", "", 0)),
        ("tcp://127.0.0.1:7000", Address(None, "127.0.0.1", 7000)),
        ("tcp://localhost", Address(None, "localhost", DEFAULT_TCP_PORT)),
        ("tcp://node-7.cluster:0", Address(None, "node-7.cluster", 0)),
        ("tcp://[::1]:9", Address(None, "::1", 9)),
    ],
)
def test_good_addresses(url: str, address: Address) -> None:
    assert Address.parse(url) == address
    assert Address.parse(str(address)) == address


@pytest.mark.parametrize(
    "url",
    [
        "",
        "/tmp/a.sock",
        "unix://",
        "unix://tmp/a.sock",
        "unix:a.sock",
        "tcp://",
        "tcp://:7000",
        "tcp://host:port",
        "tcp://host:99999",
        "tcp://host:-1",
        "tcp://[::1",
        "tcp:host",
        "http://host:80",
        "localhost:7000",
    ],
)
def test_bad_addresses_are_told_the_accepted_forms(url: str) -> None:
    with pytest.raises(
        ConnectionFailed, match=r"unix:///path.sock, tcp://host:port or tls://host:port"
    ):
        Address.parse(url)


@given(st.text(max_size=30), st.sampled_from(["", "unix://", "unix:///", "tcp://", "tcp://h:"]))
def test_any_text_is_an_address_or_refused(text: str, scheme: str) -> None:
    try:
        address = Address.parse(scheme + text)
    except ConnectionFailed:
        return
    assert Address.parse(str(address)) == address


@pytest.mark.parametrize("name", ["a#b.sock", "a?b.sock", "a%20b.sock"])
def test_a_path_is_taken_as_it_is_written(name: str) -> None:
    assert Address.parse(f"unix:///run/{name}").path == f"/run/{name}"


@pytest.mark.parametrize(
    ("url", "loopback"),
    [
        ("unix:///a", True),
        ("tcp://localhost:1", True),
        ("tcp://127.0.0.2:1", True),
        ("tcp://[::1]:1", True),
        ("tcp://0.0.0.0:1", False),
        ("tcp://10.0.0.1:1", False),
        ("tcp://[::]:1", False),
        ("tcp://127.example.com:1", False),
    ],
)
def test_loopback(url: str, loopback: bool) -> None:
    assert Address.parse(url).is_loopback is loopback


# Listening


def test_port_zero_becomes_the_port_taken() -> None:
    listener, address = listen(Address.parse("tcp://127.0.0.1:0"))
    with listener:
        assert address.port == listener.getsockname()[1] > 0
        with pytest.raises(ConnectionFailed, match=f"cannot listen on {address}"):
            listen(address)


def test_a_socket_is_for_its_owner_alone(tmp_path: Path) -> None:
    listener, _ = listen(Address.parse(f"unix://{tmp_path}/a.sock"))
    with listener:
        assert stat.S_IMODE(os.stat(tmp_path / "a.sock").st_mode) == 0o600


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    address = Address.parse(f"unix://{tmp_path}/a.sock")
    dead, _ = listen(address)
    dead.close()
    assert (tmp_path / "a.sock").exists()
    listener, _ = listen(address)
    with listener, socket.socket(socket.AF_UNIX) as client:
        client.connect(f"{tmp_path}/a.sock")


def test_a_live_socket_is_refused(base_url: str) -> None:
    with pytest.raises(ConnectionFailed, match="it is in use"):
        listen(Address.parse(base_url))
    with connect(base_url) as session:
        assert session.executor_stats()["clients_seen"] >= 1


def test_the_live_socket_of_another_program_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "log.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(path))
        with pytest.raises(ConnectionFailed):
            listen(Address.parse(f"unix://{path}"))
        assert path.exists()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_no_socket_is_not_removed(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "precious"
    if kind == "file":
        path.write_text("data")
    else:
        path.mkdir()
    with pytest.raises(ConnectionFailed, match="not a socket"):
        listen(Address.parse(f"unix://{path}"))
    assert path.exists()


@pytest.mark.parametrize("path", ["no/such/folder/a.sock", "x" * 200])
def test_a_path_that_cannot_be_bound(tmp_path: Path, path: str) -> None:
    with pytest.raises(ConnectionFailed, match="cannot listen on unix://"):
        listen(Address.parse(f"unix://{tmp_path}/{path}"))


# Connecting


def test_nobody_answers(tmp_path: Path) -> None:
    for url in (f"unix://{tmp_path}/a.sock", "tcp://127.0.0.1:1"):
        with pytest.raises(
            ConnectionFailed, match=f"no executor answers at {url}.*symbiosis serve"
        ):
            connect(url)


@contextmanager
def impostor(path: Path, behave: Callable[[socket.socket], None]) -> Iterator[str]:
    """Something that accepts one connection and is no executor."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)

        def serve() -> None:
            accepted, _ = listener.accept()
            with accepted:
                behave(accepted)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"unix://{path}"
        finally:
            thread.join()


def silent_until_the_client_leaves(accepted: socket.socket) -> None:
    while accepted.recv(4096):
        pass


def frame(kind: int, request: int, meta: bytes, payload_bytes: int = 0) -> bytes:
    return struct.pack("<2sBBIQQ", b"SY", VERSION, kind, len(meta), request, payload_bytes) + meta


@pytest.mark.parametrize(
    ("answer", "error", "told"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", ProtocolError, "not this protocol"),
        (b"SY\x09" + bytes(21), ProtocolError, "version 9"),
        (frame(2, 0, b"{}"), ProtocolError, "table of weights"),
        (frame(2, 0, b"[]"), ProtocolError, "JSON"),
        (frame(2, 9, b"{}"), ProtocolError, "answered request 0"),
        (frame(4, 0, b"{}"), ProtocolError, "REPLY"),
        (frame(7, 0, b'{"code": "protocol", "message": "go away"}'), ProtocolError, "go away"),
        (frame(6, 0, b"\xff\xff"), ProtocolError, "cut short"),
    ],
)
def test_odd_answers_to_hello(
    tmp_path: Path, answer: bytes, error: type[Exception], told: str
) -> None:
    def behave(accepted: socket.socket) -> None:
        accepted.recv(4096)
        accepted.sendall(answer)
        silent_until_the_client_leaves(accepted)

    with impostor(tmp_path / "a.sock", behave) as url, pytest.raises(error, match=told):
        connect(url)


def test_a_silent_listener_is_given_up(tmp_path: Path) -> None:
    with (
        impostor(tmp_path / "a.sock", silent_until_the_client_leaves) as url,
        pytest.raises(ConnectionFailed, match=r"a\.sock"),
    ):
        connect(url, timeout_s=0.05)


def test_a_listener_that_hangs_up(tmp_path: Path) -> None:
    with (
        impostor(tmp_path / "a.sock", lambda accepted: None) as url,
        pytest.raises(ConnectionFailed, match="hung up"),
    ):
        connect(url)


def test_a_closed_channel_is_lost(base_url: str) -> None:
    channel = SocketChannel(base_url, {"protocol": VERSION, "client": "x"})
    channel.close()
    channel.close()
    with pytest.raises(ConnectionLost, match=r"base\.sock"):
        channel.request({"get": "stats"})


def test_a_channel_in_process_is_lost_when_closed() -> None:
    with Executor.of(tiny.llama()) as executor:
        channel = executor.open_channel({"protocol": VERSION, "client": "x"})
        assert channel.request({"get": "stats"})[0]["clients_seen"] == 1
        channel.close()
        channel.close()
        with pytest.raises(ConnectionLost, match="closed"):
            channel.request({"get": "stats"})
        _, welcome = executor.attach({"protocol": VERSION})
        stats, _ = executor.answer(0, {"get": "stats"})
        assert list(stats["clients"]) == [str(welcome["session"])]  # type: ignore[call-overload]
