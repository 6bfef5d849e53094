"""Broken, hostile and vanishing clients against a real executor.

Whatever one client does, a healthy one gets right answers, and nothing of the other is left.
"""

from __future__ import annotations

import gc
import json
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

import raw
import tiny
from bad_frames import (
    BEFORE_HELLO,
    EMBED,
    ENDING,
    MAX_PAYLOAD,
    QUERY,
    REFUSED,
    UP,
    linear,
    rows_of,
    weight,
)
from raw import RawClient
from symbiosis import Executor, Session, connect
from symbiosis.errors import ConnectionLost
from symbiosis.executor.weights import Weights
from symbiosis.wire.exchange import NO_BIAS, Op

pytestmark = pytest.mark.timeout(60)


class Base:
    """An executor under attack, and what it should answer."""

    def __init__(self, executor: Executor, url: str, model: PreTrainedModel) -> None:
        self.executor = executor
        self.url = url
        self.model = model

    def check_healthy(self) -> None:
        """A new client gets right answers, and sees nobody but itself, at the latest when the
        executor has noticed who left."""
        x = torch.randn(3, 32)
        with connect(self.url, name="healthy") as session:
            for name in (QUERY, UP, QUERY):
                (number,) = weight(self.executor, name)
                expected = F.linear(x, self.model.get_parameter(f"model.layers.{name}"))
                found = session.product(Op.LINEAR, x, number, (), NO_BIAS, forward=True)
                torch.testing.assert_close(found, expected)  # a batch may be shared with the dying
            for _ in range(500):
                if len(clients_of(session)) == 1:
                    return
            raise AssertionError(f"left behind: {clients_of(session)}")


def clients_of(session: Session) -> dict[str, dict[str, object]]:
    found = session.executor_stats()["clients"]
    assert isinstance(found, dict)
    return found


@pytest.fixture
def transport(request: pytest.FixtureRequest) -> str:
    """A UNIX socket, unless `both_transports` asks for TCP."""
    return str(getattr(request, "param", "unix"))


both_transports = pytest.mark.parametrize("transport", ["unix", "tcp"], indirect=True)


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Whatever libraries open once is open before descriptors are counted, and what they
    allocate is left out of the collections to come."""
    with Executor.of(tiny.llama()) as executor:
        url = f"unix://{tmp_path_factory.mktemp('warm')}/base.sock"
        executor.listen([url])
        with connect(url) as session:
            session.model()(tiny.tokens())
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def base(tmp_path: Path, transport: str) -> Iterator[Base]:
    """A fresh executor; afterwards it is healthy, and leaves nothing when it stops."""
    gc.collect()
    descriptors, threads = psutil.Process().num_fds(), set(threading.enumerate())
    model = tiny.llama()
    url = f"unix://{tmp_path}/base.sock" if transport == "unix" else "tcp://127.0.0.1:0"
    executor = Executor(Weights(model, "tiny"), max_payload_bytes=MAX_PAYLOAD)
    (url,) = executor.listen([url])
    under_attack = Base(executor, url, model)
    yield under_attack
    try:
        under_attack.check_healthy()
    finally:
        executor.close()
    gc.collect()
    assert set(threading.enumerate()) == threads
    assert psutil.Process().num_fds() == descriptors
    assert not list(tmp_path.iterdir())


# Frames that end the connection: the reason is told, then it is closed.


@pytest.mark.parametrize("case", ENDING)
def test_a_frame_that_makes_no_sense_ends_the_connection(base: Base, case: str) -> None:
    with RawClient(base.url) as client:
        client.send(ENDING[case](base.executor))
        answer = client.receive()
        assert (answer.code, answer.request) == ("protocol", 0)
        assert client.hung_up()


@pytest.mark.parametrize("case", BEFORE_HELLO)
def test_a_wrong_greeting_ends_the_connection(base: Base, case: str) -> None:
    with RawClient(base.url, greet=False) as client:
        client.send(BEFORE_HELLO[case])
        assert client.receive().code == "protocol"
        assert client.hung_up()


# Frames that are refused: the session goes on.


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_frame_is_answered_and_the_session_goes_on(base: Base, case: str) -> None:
    """Where no code is given, any answer to the request will do."""
    code, make = REFUSED[case]
    with RawClient(base.url) as client:
        client.send(make(base.executor))
        answer = client.receive()
        assert answer.request == 7
        if code:
            assert answer.code == code
        client.exchange(8, linear(base.executor), rows_of(1.0))
        answer = client.receive()
        assert (answer.kind, answer.request) == (raw.RESULT, 8)
        expected = torch.ones(2, 32) @ base.model.get_parameter(f"model.layers.{QUERY}").T
        found = torch.frombuffer(bytearray(answer.payload), dtype=torch.float32).view(2, 32)
        torch.testing.assert_close(found, expected)


@both_transports
def test_one_bad_frame_among_good_ones(base: Base) -> None:
    """All in one write: each is answered, in an order of the executor's choice."""
    bad = raw.exchange_meta(raw.LINEAR, (999,), (2, 32))
    metas = [linear(base.executor), bad, linear(base.executor), bad, linear(base.executor)]
    with RawClient(base.url) as client:
        client.send(
            b"".join(
                raw.frame(raw.EXCHANGE, n, meta, rows_of(float(n))) for n, meta in enumerate(metas)
            )
        )
        kinds = {answer.request: answer.kind for answer in (client.receive() for _ in metas)}
    assert kinds == {0: raw.RESULT, 1: raw.ERROR, 2: raw.RESULT, 3: raw.ERROR, 4: raw.RESULT}


# Clients that vanish


@pytest.mark.parametrize("kept", [1, 23, 24, 30, 60, 100])
def test_a_frame_cut_off_by_a_disconnect(base: Base, kept: int) -> None:
    with RawClient(base.url) as client:
        client.send(raw.frame(raw.EXCHANGE, 1, linear(base.executor), rows_of(1.0))[:kept])


@both_transports
def test_vanishing_before_hello(base: Base) -> None:
    for _ in range(5):
        RawClient(base.url, greet=False).close()


@both_transports
def test_vanishing_with_a_reset(base: Base) -> None:
    """As when a process is killed: with answers unread, and at once."""
    for greet in (False, True, True):
        client = RawClient(base.url, greet=greet)
        if greet:
            for request in range(20):
                client.exchange(request, linear(base.executor), rows_of(1.0))
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()


@both_transports
def test_vanishing_while_an_exchange_is_queued(base: Base) -> None:
    """The exchanges and the disconnect are there before the executor looks at either."""
    for _ in range(5):
        with RawClient(base.url) as client:
            burst = (
                raw.frame(raw.EXCHANGE, n, linear(base.executor), rows_of(1.0)) for n in range(50)
            )
            client.send(b"".join(burst))


# Clients that do not read


@both_transports
def test_requests_without_reading_hold_up_nobody_and_no_memory(base: Base) -> None:
    """A thousand requests of 256 KiB each, in one write; none of the answers is read."""
    big = torch.zeros(1 << 16)
    base.executor.weights.shipped["model.big"] = big
    question = raw.json_frame(raw.REQUEST, 1, {"get": "parameters"})
    before = psutil.Process().memory_info().rss
    with RawClient(base.url) as client:
        client.send(question * 1000)
        check_a_whole_model(base)
        grown = psutil.Process().memory_info().rss - before
    del base.executor.weights.shipped["model.big"]
    assert grown < 64 << 20, f"{grown >> 20} MiB wait for a client that does not read"


@both_transports
def test_exchanges_without_reading_are_not_computed_without_end(base: Base) -> None:
    """Each small frame has an answer of 400 KiB; few are computed before one is taken."""
    lookups, ids = weight(base.executor, EMBED) * 40, (80,)
    meta = raw.exchange_meta(raw.EMBEDDING, lookups, ids, dtype=raw.INT32)
    frame = raw.frame(raw.EXCHANGE, 1, meta, bytes(4 * 80))
    with RawClient(base.url) as client:
        client.send(frame * 150)
        with connect(base.url) as session:
            while session.executor_stats()["waiting"]:
                pass
            computed = clients_of(session)[str(client.session)]["exchanges"]
        check_a_whole_model(base)
        assert isinstance(computed, int)
        assert 0 < computed <= 60


def check_a_whole_model(base: Base) -> None:
    ids = tiny.tokens()
    with connect(base.url) as session, torch.no_grad():
        assert torch.equal(session.model()(ids).logits, base.model(ids).logits)


@both_transports
def test_answers_taken_late_are_complete(base: Base) -> None:
    """More than any socket buffer holds, sent in full before the first answer is read."""
    rows, requests = 500, 60
    meta = raw.exchange_meta(raw.LINEAR, weight(base.executor, UP), (rows, 32))
    expected = torch.ones(rows, 32) @ base.model.get_parameter(f"model.layers.{UP}").T
    with RawClient(base.url) as client:

        def send() -> None:
            for request in range(requests):
                client.exchange(request, meta, rows_of(1.0, rows))

        sender = threading.Thread(target=send)
        sender.start()
        answers = [client.receive() for _ in range(requests)]
        sender.join()
    assert [answer.request for answer in answers] == list(range(requests))
    for answer in answers:
        found = torch.frombuffer(bytearray(answer.payload), dtype=torch.float32)
        torch.testing.assert_close(found.view(rows, 64), expected)


# Neighbours


def test_nan_does_not_reach_a_neighbours_rows(base: Base) -> None:
    """Both wait at once behind a burst, so that some of theirs share batches."""
    expected = torch.ones(2, 32) @ base.model.get_parameter(f"model.layers.{QUERY}").T
    batched = 0
    with RawClient(base.url) as sick, RawClient(base.url) as well:
        for _ in range(200):
            sick.exchange(1, linear(base.executor), rows_of(float("nan")))
            well.exchange(2, linear(base.executor), rows_of(1.0))
            poisoned, clean = sick.receive(), well.receive()
            found = torch.frombuffer(bytearray(clean.payload), dtype=torch.float32)
            torch.testing.assert_close(found.view(2, 32), expected)
            values = torch.frombuffer(bytearray(poisoned.payload), dtype=torch.float32)
            assert values.isnan().all()
            batched += struct.unpack_from("<IIH", clean.meta)[2] - 1
            if batched >= 3:
                return
    pytest.skip("the two never met in a batch")


def test_a_slow_frame_does_not_hold_up_the_others(base: Base) -> None:
    frame = raw.frame(raw.EXCHANGE, 5, linear(base.executor), rows_of(1.0))
    with RawClient(base.url) as slow:
        for at in range(0, len(frame), 40):
            slow.send(frame[at : at + 40])
            with connect(base.url) as session:
                assert session.executor_stats()["waiting"] == 0
        assert slow.receive().request == 5


# The executor's end


def test_an_executor_that_stops_is_a_lost_connection(tmp_path: Path) -> None:
    executor = Executor.of(tiny.llama())
    (url,) = executor.listen([f"unix://{tmp_path}/base.sock"])
    model = connect(url, retry_s=0).model()
    under_way = threading.Event()
    lost: list[BaseException] = []

    def work() -> None:
        try:
            while True:
                model(tiny.tokens())
                under_way.set()
        except ConnectionLost as error:
            lost.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    assert under_way.wait(30)
    with RawClient(url) as idle:
        executor.close()
        told = idle.receive()
        assert (told.kind, told.code) == (raw.ERROR, "connection-lost")
        assert "shutting down" in json.loads(told.meta)["message"]
        assert idle.hung_up()
    worker.join(30)
    assert lost, "the client did not notice"
    assert url in str(lost[0]) or "shutting down" in str(lost[0])
