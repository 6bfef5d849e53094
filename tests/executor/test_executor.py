"""`Executor` as an object: what it answers outside the data path, listening, closing."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch

import tiny
from symbiosis import Executor, connect
from symbiosis.errors import (
    ConnectionFailed,
    FetchRefused,
    ModelError,
    ProtocolError,
    SymbiosisError,
    UnknownWeight,
)
from symbiosis.executor import digests
from symbiosis.executor.server import Server
from symbiosis.executor.weights import Weights
from symbiosis.transport.addresses import Address
from symbiosis.wire.digest import tensor_digest
from symbiosis.wire.frames import VERSION, Limits

HELLO = {"protocol": VERSION, "client": "ann", "pid": 7}


def test_the_welcome_describes_the_model(executor: Executor) -> None:
    client, welcome = executor.attach(HELLO)
    assert welcome["session"] == client
    assert welcome["architecture"] == "LlamaForCausalLM"
    assert welcome["dtype"] == "float32"
    shapes = {w["names"][0]: w["shape"] for w in welcome["weights"]}  # type: ignore[attr-defined]
    assert shapes["model.embed_tokens.weight"] == [tiny.VOCABULARY, 32]
    executor.detach(client)


@pytest.mark.parametrize("protocol", [VERSION + 1, 0, None, "1", []])
def test_another_protocol_is_refused(executor: Executor, protocol: object) -> None:
    with pytest.raises(ProtocolError, match="same release"):
        executor.attach({"protocol": protocol})


@pytest.mark.parametrize("hello", [{}, {"client": ["x"], "pid": "y"}, {"client": "n" * 9999}])
def test_odd_names_are_taken_as_text(executor: Executor, hello: dict[str, object]) -> None:
    client, _ = executor.attach({"protocol": VERSION, **hello})
    stats, _ = executor.answer(client, {"get": "stats"})
    assert len(stats["clients"][str(client)]["name"]) <= 64  # type: ignore[index]
    executor.detach(client)


def test_a_name_cannot_write_into_a_log_or_a_terminal(executor: Executor) -> None:
    hello = {"protocol": VERSION, "client": "a\nready\x1b[2J é"}
    client, _ = executor.attach(hello)
    stats, _ = executor.answer(client, {"get": "stats"})
    assert stats["clients"][str(client)]["name"] == "a?ready?[2J é"  # type: ignore[index]
    executor.detach(client)


def test_a_weight_is_handed_out_as_the_policy_says(tmp_path: Path) -> None:
    model = tiny.llama()
    with Executor(Weights(model, "tiny")) as open_handed:
        client, _ = open_handed.attach(HELLO)
        answer, payload = open_handed.answer(client, {"get": "weight", "id": 1, "why": "a test"})
        weight = open_handed.weights[1].tensor
        assert answer["dtype"] == "float32"
        assert torch.equal(payload.view(torch.float32).view(weight.shape), weight)
    with Executor(Weights(model, "tiny"), fetch="deny") as close_fisted:
        client, _ = close_fisted.attach(HELLO)
        with pytest.raises(FetchRefused, match=r"a test needs .*--fetch allow"):
            close_fisted.answer(client, {"get": "weight", "id": 1, "why": "a test"})


@pytest.mark.parametrize("number", [0, 999, -1, None, "1", [1], 1.0])
def test_a_weight_that_does_not_exist(executor: Executor, number: object) -> None:
    client, _ = executor.attach(HELLO)
    with pytest.raises(UnknownWeight):
        executor.answer(client, {"get": "weight", "id": number, "why": "a test"})


@pytest.mark.parametrize("question", [{}, {"get": None}, {"get": "x" * 9999}, {"get": ["stats"]}])
def test_unknown_questions(executor: Executor, question: dict[str, object]) -> None:
    with pytest.raises(ProtocolError, match="unknown request"):
        executor.answer(1, question)


def test_several_addresses_and_the_ports_really_taken(tmp_path: Path) -> None:
    with Executor.of(tiny.llama()) as executor:
        urls = executor.listen([f"unix://{tmp_path}/a.sock", "tcp://127.0.0.1:0"])
        assert urls[0] == f"unix://{tmp_path}/a.sock"
        assert urls[1].startswith("tcp://127.0.0.1:")
        assert not urls[1].endswith(":0")
        for url in urls:
            with connect(url) as session:
                assert session.url == url
        with pytest.raises(SymbiosisError, match="already"):
            executor.listen(urls)
    assert not (tmp_path / "a.sock").exists()
    for url in urls:
        with pytest.raises(ConnectionFailed):
            connect(url)


def test_a_bad_address_leaves_nothing_behind(tmp_path: Path) -> None:
    good = f"unix://{tmp_path}/a.sock"
    with Executor.of(tiny.llama()) as executor:
        with pytest.raises(ConnectionFailed):
            executor.listen([good, f"unix://{tmp_path}/no/such/folder.sock"])
        assert executor.listen([good]) == [good]


def test_close_is_idempotent_and_wait_returns(tmp_path: Path) -> None:
    executor = Executor.of(tiny.llama())
    executor.close()
    executor.listen([f"unix://{tmp_path}/a.sock"])
    waiting = threading.Thread(target=executor.wait)
    waiting.start()
    executor.close()
    executor.close()
    waiting.join(timeout=30)
    assert not waiting.is_alive()


def test_a_digest_under_way_ends_with_the_executor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads that are left in torch abort the process when the interpreter ends."""

    def slow(tensor: torch.Tensor) -> str:
        time.sleep(0.02)
        return tensor_digest(tensor)

    monkeypatch.setattr(digests, "tensor_digest", slow)
    executor = Executor.of(tiny.llama())
    url = f"unix://{tmp_path}/a.sock"
    executor.listen([url])
    executor.close()
    assert executor.digest.ready is None
    assert not [t for t in threading.enumerate() if t.name.startswith("symbiosis-digest")]
    executor.listen([url])
    with connect(url) as session:
        assert session.digest == executor.digest.ready
    executor.close()


def test_a_server_that_is_not_read_is_woken_without_waiting(tmp_path: Path) -> None:
    executor = Executor.of(tiny.llama())
    address = Address.parse(f"unix://{tmp_path}/a.sock")
    server = Server(executor, executor._engine, [address], Limits())
    waking = threading.Thread(target=lambda: [server._wake() for _ in range(5000)], daemon=True)
    waking.start()
    waking.join(timeout=60)
    assert not waking.is_alive()
    server._close_all()


def test_a_strange_protocol_cannot_write_into_a_log(executor: Executor) -> None:
    with pytest.raises(ProtocolError) as raised:
        executor.attach({"protocol": "\x1b[2J\nready" + "x" * 9999})
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 200


def test_load(tmp_path: Path) -> None:
    tiny.gpt2().save_pretrained(tmp_path)
    with Executor.load(str(tmp_path), policy="none", fetch="deny") as executor:
        assert executor.describe()["architecture"] == "GPT2LMHeadModel"
        assert executor.describe()["dtype"] == "float32"
    with pytest.raises(ModelError):
        Executor.load(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    "terms",
    [{"weight": 0}, {"weight": "2"}, {"weight": 1e9}, {"deadline_ms": -1}, {"deadline_ms": "x"}],
)
def test_terms_that_make_no_sense_are_refused(executor: Executor, terms: dict[str, object]) -> None:
    with pytest.raises(ProtocolError, match="must be"):
        executor.attach({**HELLO, **terms})


def test_terms_are_taken(executor: Executor) -> None:
    client, _ = executor.attach({**HELLO, "weight": 2, "deadline_ms": 5})
    assert executor._engine._scheduler._terms[client] == (2, 0.005)
