"""TLS on real sockets: who is trusted, what is refused and how it is told, and the same bits."""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import pytest
import torch

import raw
import tiny
from certificates import Files, TlsRawClient, connect_tcp, make
from symbiosis import Executor, Tls, connect
from symbiosis.errors import ConnectionFailed, ProtocolError
from symbiosis.executor.weights import Weights
from symbiosis.transport.addresses import Address
from symbiosis.transport.tls import ServerTls
from symbiosis.wire.exchange import NO_BIAS, Op

URL = "tls://127.0.0.1:0"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., list[str]]]:
    """``start(tls, *urls)``: a tiny Llama behind these URLs."""
    with contextlib.ExitStack() as stack:

        def host(tls: ServerTls, *urls: str) -> list[str]:
            executor = stack.enter_context(Executor(Weights(tiny.llama(), "tiny")))
            return executor.listen(urls or [URL], tls=tls)

        yield host


def test_the_address_says_tls() -> None:
    address = Address.parse("tls://example.org")
    assert address.is_tls and str(address) == "tls://example.org:7420"


def test_training_and_generation_over_tls_have_the_bits_of_a_unix_socket(
    start: Callable[..., list[str]], files: Files, tmp_path: Path
) -> None:
    unix, tls = start(files.serving(), f"unix://{tmp_path}/base.sock", URL)
    assert tls.startswith("tls://127.0.0.1:")
    outcomes = [_train_and_generate(unix, None), _train_and_generate(tls, files.trusting())]
    (text, adapter), (same_text, same_adapter) = outcomes
    assert torch.equal(text, same_text)
    assert adapter.keys() == same_adapter.keys() and len(adapter) > 0
    assert all(torch.equal(adapter[name], same_adapter[name]) for name in adapter)


def _train_and_generate(url: str, tls: Tls | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    with connect(url, tls=tls) as base:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian")
        model = peft.get_peft_model(base.model(), config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        ids = torch.arange(24).reshape(2, 12) % tiny.VOCABULARY
        for _ in range(3):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        text = model.generate(input_ids=ids[:1, :4], max_new_tokens=8, do_sample=False)
        return text, peft.get_peft_model_state_dict(model)


def test_a_big_payload_comes_back_with_the_same_bits(
    start: Callable[..., list[str]], files: Files, tmp_path: Path
) -> None:
    unix, tls = start(files.serving(), f"unix://{tmp_path}/base.sock", URL)
    ids = torch.randint(0, tiny.VOCABULARY, (1, 60_000))  # 7.7 MB back
    x = torch.randn(60_000, 32)  # 7.7 MB each way
    answers = []
    for url, trust in ((unix, None), (tls, files.trusting())):
        with connect(url, tls=trust, arena_bytes=0) as base:
            weight = next(w.id for w in base.weights.values() if "q_proj" in w.names[0])
            answers.append(
                (
                    base.lookup(ids, 1, ()),
                    base.product(Op.LINEAR, x, weight, (), NO_BIAS, forward=False),
                )
            )
    for ours, theirs in zip(*answers, strict=True):
        assert ours.shape[-2] == 60_000 and torch.equal(ours, theirs)


def test_another_authority_is_not_trusted(
    start: Callable[..., list[str]], files: Files, tmp_path: Path
) -> None:
    (url,) = start(files.serving())
    other = make(tmp_path / "other")
    with pytest.raises(ConnectionFailed, match=r"is not trusted: .*--tls-ca"):
        connect(url, tls=other.trusting())
    with pytest.raises(ConnectionFailed, match="is not trusted"):
        connect(url)  # the system's authorities
    with connect(url, tls=files.trusting()) as base:
        assert base.welcome["model"] == "tiny"


def test_another_hostname_is_not_trusted(start: Callable[..., list[str]], tmp_path: Path) -> None:
    files = make(tmp_path / "elsewhere", host="elsewhere.test")
    (url,) = start(files.serving())
    with pytest.raises(ConnectionFailed, match=r"is not trusted: .*hostname"):
        connect(url, tls=files.trusting())


def test_tls_1_2_is_refused(start: Callable[..., list[str]], files: Files) -> None:
    (url,) = start(files.serving())
    context = ssl.create_default_context(cafile=files.ca)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with connect_tcp(url) as connection, pytest.raises(ssl.SSLError, match=r"(?i)protocol.version"):
        context.wrap_socket(connection, server_hostname="127.0.0.1")
    with TlsRawClient(url, files) as modern:
        assert modern.socket.version() == "TLSv1.3"  # type: ignore[attr-defined]


def test_a_client_without_tls_is_told_so(start: Callable[..., list[str]], files: Files) -> None:
    (url,) = start(files.serving())
    with pytest.raises(ProtocolError, match="takes TLS only: connect to tls://"):
        connect(url.replace("tls://", "tcp://"))


def test_a_client_with_tls_at_a_plain_port_is_told_so(
    start: Callable[..., list[str]], files: Files
) -> None:
    (url,) = start(files.serving(), "tcp://127.0.0.1:0")
    with pytest.raises(ConnectionFailed, match=r"no TLS 1\.3 with tls://.*tcp:// one"):
        connect(url.replace("tcp://", "tls://"), tls=files.trusting())


def test_trust_for_an_address_without_tls_is_refused(files: Files) -> None:
    with pytest.raises(ConnectionFailed, match="not encrypted: write tls://"):
        connect("tcp://127.0.0.1:1", tls=files.trusting())


@pytest.mark.parametrize("missing", ["ca", "cert"])
def test_missing_files_are_named(files: Files, tmp_path: Path, missing: str) -> None:
    path = tmp_path / "nothing.pem"
    tls = Tls(ca=path) if missing == "ca" else Tls(ca=files.ca, cert=path)
    with pytest.raises(ConnectionFailed, match=r"nothing\.pem.*No such file"):
        connect("tls://127.0.0.1:1", tls=tls)
    with pytest.raises(ConnectionFailed, match=r"nothing\.pem"):
        ServerTls(path).context()


def test_tls_without_a_certificate_to_show_is_refused(tmp_path: Path) -> None:
    with (
        Executor(Weights(tiny.llama(), "tiny")) as executor,
        pytest.raises(ConnectionFailed, match="needs a certificate: give --tls-cert"),
    ):
        executor.listen([URL])


def test_a_handshake_that_never_ends_holds_up_nobody(
    start: Callable[..., list[str]], files: Files
) -> None:
    (url,) = start(files.serving())
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connect_tcp(url)) for _ in range(4)]
        hello = _client_hello(files)
        for connection in silent[1:]:
            connection.sendall(hello[:-1])  # all but the last byte
        with connect(url, tls=files.trusting()) as base:
            assert base.lookup(torch.tensor([[1, 2]]), 1, ()).shape == (1, 2, 32)
            for connection in silent[1:]:  # they are still welcome
                connection.sendall(hello[-1:])
                assert connection.recv(1) == b"\x16"
            assert base.lookup(torch.tensor([[3]]), 1, ()).shape == (1, 1, 32)


def _client_hello(files: Files) -> bytes:
    context = ssl.create_default_context(cafile=files.ca)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    half = context.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
    with contextlib.suppress(ssl.SSLWantReadError):
        half.do_handshake()
    return outgoing.read()


@pytest.mark.parametrize("garbage", [b"\x16\x03\x01\x00\x05aaaaa", b"GET / HTTP/1.1\r\n\r\n", b"S"])
def test_garbage_ends_its_own_connection_only(
    start: Callable[..., list[str]], files: Files, garbage: bytes
) -> None:
    (url,) = start(files.serving())
    with connect_tcp(url) as broken, TlsRawClient(url, files) as other:
        broken.sendall(garbage)
        with contextlib.suppress(OSError):  # reset already
            broken.shutdown(socket.SHUT_WR)
            while broken.recv(4096):
                pass
        other.send(raw.json_frame(raw.REQUEST, 1, {"get": "stats"}))
        assert other.receive().kind == raw.REPLY


def test_frames_that_share_a_record_are_all_answered(
    start: Callable[..., list[str]], files: Files
) -> None:
    """What is decrypted and not yet read is not seen by select."""
    (url,) = start(files.serving())
    with TlsRawClient(url, files) as client:
        meta = raw.exchange_meta(raw.EMBEDDING, (1,), (1, 1), dtype=raw.INT64)
        count = 40  # beyond what may be in flight
        frames = [raw.frame(raw.EXCHANGE, n, meta, bytes(8)) for n in range(1, count + 1)]
        assert len(b"".join(frames)) < 16384
        client.send(b"".join(frames))
        assert [client.receive().request for _ in range(count)] == list(range(1, count + 1))


def test_a_record_that_goes_on_after_a_payload_is_read_to_its_end(
    start: Callable[..., list[str]], files: Files
) -> None:
    """A payload has memory of its own, which is full before the record is."""
    (url,) = start(files.serving())
    with TlsRawClient(url, files) as client:
        rows = 1000
        meta = raw.exchange_meta(raw.EMBEDDING, (1,), (rows,), dtype=raw.INT64)
        whole = raw.frame(raw.EXCHANGE, 1, meta, bytes(8 * rows))
        head = whole[: -8 * rows]
        client.send(head)
        time.sleep(0.2)  # the executor waits for the payload now
        client.send(whole[len(head) :] + raw.json_frame(raw.REQUEST, 2, {"get": "stats"}))
        assert sorted(client.receive().request for _ in range(2)) == [1, 2]


def test_a_slow_reader_gets_everything(start: Callable[..., list[str]], files: Files) -> None:
    """The executor's answers do not fit the socket's buffers; records are begun and finished."""
    (url,) = start(files.serving())
    with TlsRawClient(url, files) as slow, connect(url, tls=files.trusting()) as other:
        rows = 40_000
        meta = raw.exchange_meta(raw.EMBEDDING, (1,), (rows,), dtype=raw.INT64)
        for number in (1, 2, 3):
            slow.exchange(number, meta, bytes(8 * rows))
        first = other.lookup(torch.zeros(1, 1, dtype=torch.int64), 1, ())
        time.sleep(0.2)
        for number in (1, 2, 3):
            answer = slow.receive()
            assert answer.request == number
            found = torch.frombuffer(bytearray(answer.payload), dtype=torch.float32)
            assert torch.equal(found.view(rows, 32), first[0].expand(rows, 32))


def test_mutual_tls_asks_every_client_for_its_certificate(
    start: Callable[..., list[str]], files: Files, tmp_path: Path
) -> None:
    (url,) = start(files.serving(mutual=True))
    with pytest.raises(ConnectionFailed, match="hung up"):
        connect(url, tls=files.trusting())
    stranger = make(tmp_path / "strangers").stranger
    with pytest.raises(ConnectionFailed, match="hung up"):
        connect(url, tls=files.trusting(stranger))
    with connect(url, tls=files.trusting(files.ann), name="mine") as base:
        stats = base.executor_stats()
        assert stats["tenant"]["name"] == "ann"
        assert [client["name"] for client in stats["clients"].values()] == ["mine"]
        with connect(url, tls=files.trusting(files.stranger)) as eve:
            assert eve.executor_stats()["tenant"]["name"] == "eve"
            assert len(base.executor_stats()["clients"]) == 1
