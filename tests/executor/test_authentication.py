"""Who is let in, what each tenant may, and what happens when a key ends: real sockets."""

from __future__ import annotations

import contextlib
import json
import logging
import pickle
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch

import raw
import tiny
from certificates import Files, make
from symbiosis import Executor, Session, connect
from symbiosis.errors import (
    AuthenticationFailed,
    ConnectionFailed,
    ConnectionLost,
    FetchRefused,
    KeyStoreError,
    QuotaExceeded,
    RequestRefused,
)
from symbiosis.executor import keystore
from symbiosis.executor.bounds import Bounds
from symbiosis.executor.weights import Weights

IDS = torch.tensor([[1, 2, 3]])


class Guarded:
    """An executor with a key store, and its keys."""

    def __init__(self, folder: Path) -> None:
        self.store = folder / "keys.json"
        self.url = f"unix://{folder}/base.sock"
        self.ann, self.ann_key = keystore.create(self.store, "ann")
        self.bob, self.bob_key = keystore.create(self.store, "bob")

    def grant(self, **tenants: dict[str, object]) -> None:
        """Write terms into the store."""
        value = json.loads(self.store.read_text())
        value["tenants"].update(tenants)
        self.store.write_text(json.dumps(value))

    def connect(self, key: str | None, **options: object) -> Session:
        return connect(self.url, key=key, retry_s=0, **options)  # type: ignore[arg-type]


@pytest.fixture
def guarded(tmp_path: Path) -> Guarded:
    return Guarded(tmp_path)


@pytest.fixture
def start(guarded: Guarded) -> Iterator[Callable[..., Executor]]:
    started: list[Executor] = []

    def host(**options: object) -> Executor:
        executor = Executor(
            Weights(tiny.llama(), "tiny"),
            keys=guarded.store,
            **options,  # type: ignore[arg-type]
        )
        started.append(executor)
        executor.listen([guarded.url])
        return executor

    yield host
    for executor in started:
        executor.close()


def test_a_key_opens_the_door_and_everything_else_gets_one_answer(
    guarded: Guarded, start: Callable[..., Executor]
) -> None:
    soon = datetime.now(UTC) - timedelta(seconds=1)
    expired, _ = keystore.create(guarded.store, "ann", soon)
    start()
    with guarded.connect(guarded.ann) as base:
        assert base.lookup(IDS, 1, ()).shape == (1, 3, 32)
    refusals = set()
    for key in (None, "", "wrong", guarded.ann[:-1], guarded.ann_key.sha256, expired):
        with pytest.raises(AuthenticationFailed, match="does not know you") as caught:
            guarded.connect(key)
        refusals.add(str(caught.value))
    assert len(refusals) == 1


@pytest.mark.parametrize("key", [7, None, [], {"a": 1}, "\ud800", "k" * 10_000])
def test_nothing_about_the_model_is_said_before(
    guarded: Guarded, start: Callable[..., Executor], key: object
) -> None:
    start()
    with raw.RawClient(guarded.url, greet=False) as client:
        client.send(raw.hello(key=key))
        answer = client.receive()
        assert answer.code == "authentication-failed" and answer.request == 0
        assert b"tiny" not in answer.meta and b"Llama" not in answer.meta
        assert client.hung_up()
    with raw.RawClient(guarded.url, greet=False) as client:  # a question first
        client.send(raw.json_frame(raw.REQUEST, 1, {"get": "stats"}))
        assert client.receive().code == "protocol"
        assert client.hung_up()


def test_a_revoked_key_ends_its_sessions_and_a_new_one_takes_over(
    guarded: Guarded, start: Callable[..., Executor]
) -> None:
    start()
    with guarded.connect(guarded.ann) as ann, guarded.connect(guarded.bob) as bob:
        ann.lookup(IDS, 1, ())
        fresh, _ = keystore.create(guarded.store, "ann")
        keystore.revoke(guarded.store, guarded.ann_key.id)
        with pytest.raises(AuthenticationFailed):
            while True:
                _next(ann)
        with pytest.raises(AuthenticationFailed):
            guarded.connect(guarded.ann)
        assert bob.lookup(IDS, 1, ()).shape == (1, 3, 32)
        with guarded.connect(fresh) as again:
            assert again.lookup(IDS, 1, ()).shape == (1, 3, 32)


def _next(session: Session) -> None:
    """One exchange. That the connection is lost in between is one way to learn of its end; the
    next exchange says why."""
    with contextlib.suppress(ConnectionLost):
        session.lookup(IDS, 1, ())
        time.sleep(0.05)


def test_a_key_that_expires_ends_its_sessions(
    guarded: Guarded, start: Callable[..., Executor]
) -> None:
    brief, _ = keystore.create(guarded.store, "ann", datetime.now(UTC) + timedelta(seconds=3))
    start()
    with guarded.connect(brief) as base:
        base.lookup(IDS, 1, ())
        with pytest.raises(AuthenticationFailed):
            while True:
                _next(base)


def test_a_malformed_store_is_refused_and_the_old_one_stays(
    guarded: Guarded, start: Callable[..., Executor], caplog: pytest.LogCaptureFixture
) -> None:
    start()
    good = guarded.store.read_text()
    with guarded.connect(guarded.ann) as base:
        guarded.store.write_text(good.replace('"keys"', '"kyes"'))
        while "stays in force" not in caplog.text:
            base.lookup(IDS, 1, ())
            time.sleep(0.05)
        assert "no field 'kyes'" in caplog.text
        with guarded.connect(guarded.bob) as bob:
            assert bob.lookup(IDS, 1, ()).shape == (1, 3, 32)
        assert base.lookup(IDS, 1, ()).shape == (1, 3, 32)
    with pytest.raises(KeyStoreError):
        Executor(Weights(tiny.llama(), "tiny"), keys=guarded.store)


def test_a_key_shows_nowhere(
    guarded: Guarded,
    start: Callable[..., Executor],
    caplog: pytest.LogCaptureFixture,
) -> None:
    executor = start()
    with caplog.at_level(logging.DEBUG), guarded.connect(guarded.ann, name="x") as base:
        seen = [repr(base), repr(vars(base)), repr(executor.describe()), str(base.welcome)]
        seen.append(str(base.executor_stats()))
        for key in ("wrong-key-of-mine",):
            with pytest.raises(AuthenticationFailed) as caught:
                guarded.connect(key)
            seen.append(repr(caught.value))
        # A worker process has to present it.
        copy = pickle.loads(pickle.dumps(base))  # noqa: S301
        assert copy.lookup(IDS, 1, ()).shape == (1, 3, 32)
        seen.append(repr(vars(copy)))
        copy.close()
    for text in [*seen, caplog.text]:
        assert guarded.ann not in text and "wrong-key-of-mine" not in text


def test_a_key_is_not_sent_in_the_clear_beyond_the_host() -> None:
    with pytest.raises(ConnectionFailed, match=r"the key is not sent to tcp://192\.0\.2\.1:7420"):
        connect("tcp://192.0.2.1", key="k")


def test_a_tenant_sees_its_own_clients_and_nothing_of_others(
    guarded: Guarded, start: Callable[..., Executor]
) -> None:
    executor = start()
    with guarded.connect(guarded.ann, name="one") as ann, guarded.connect(guarded.ann, name="two"):
        before = ann.executor_stats()
        with guarded.connect(guarded.bob, name="secret-project") as bob:
            for _ in range(3):
                bob.lookup(IDS, 1, ())
            after = ann.executor_stats()
            assert before == after
            assert {client["name"] for client in after["clients"].values()} == {"one", "two"}
            assert [c["name"] for c in bob.executor_stats()["clients"].values()] == [
                "secret-project"
            ]
    with connect(executor) as within:  # this process could look into its memory
        assert "exchanges_per_s" in within.executor_stats()


def test_what_a_tenant_may_ask(guarded: Guarded, start: Callable[..., Executor]) -> None:
    guarded.grant(ann={"fetch": "deny", "requests": ["files", "digest"]}, bob={"fetch": "allow"})
    start(fetch="deny")
    with guarded.connect(guarded.ann) as ann, guarded.connect(guarded.bob) as bob:
        assert ann.welcome["fetch"] == "deny" and bob.welcome["fetch"] == "allow"
        assert ann.model_folder().is_dir()
        with pytest.raises(RequestRefused, match="ann may not ask for 'stats'"):
            ann.executor_stats()
        with pytest.raises(RequestRefused, match="ann may not ask for 'parameters'"):
            ann.shipped()
        with pytest.raises(FetchRefused):
            ann.fetch(1, "a test")
        assert bob.fetch(1, "a test").shape == (tiny.VOCABULARY, 32)
        assert bob.executor_stats()["tenant"]["name"] == "bob"
        assert ann.lookup(IDS, 1, ()).shape == (1, 3, 32)


def test_terms_change_in_mid_session(guarded: Guarded, start: Callable[..., Executor]) -> None:
    start()
    with guarded.connect(guarded.ann) as ann:
        assert ann.executor_stats()["tenant"]["quota"]["max_sessions"] is None
        guarded.grant(ann={"max_sessions": 1})
        while ann.executor_stats()["tenant"]["quota"]["max_sessions"] is None:
            time.sleep(0.05)
        with pytest.raises(QuotaExceeded, match="has 1 sessions and may have 1"):
            guarded.connect(guarded.ann)


def test_sessions_are_counted_and_released(
    guarded: Guarded, start: Callable[..., Executor]
) -> None:
    guarded.grant(ann={"max_sessions": 2})
    start()
    with guarded.connect(guarded.ann) as first, guarded.connect(guarded.bob):
        with guarded.connect(guarded.ann), pytest.raises(QuotaExceeded, match="ann has 2 sessions"):
            guarded.connect(guarded.ann)
        while first.executor_stats()["tenant"]["sessions"] > 1:
            time.sleep(0.01)
        with guarded.connect(guarded.ann) as again:
            assert again.lookup(IDS, 1, ()).shape == (1, 3, 32)


def test_rows_beyond_the_rate_are_delayed_not_refused(
    guarded: Guarded, start: Callable[..., Executor]
) -> None:
    guarded.grant(ann={"rows_per_s": 60, "burst_rows": 10})
    start()
    with guarded.connect(guarded.ann) as ann, guarded.connect(guarded.bob) as bob:
        began_s = time.monotonic()
        for _ in range(10):
            assert ann.lookup(torch.zeros(1, 10, dtype=torch.int64), 1, ()).shape == (1, 10, 32)
        # 100 rows: the last exchange went when the first 90 had flowed in, but for the burst.
        assert time.monotonic() - began_s >= (90 - 10) / 60
        for _ in range(10):
            bob.lookup(IDS, 1, ())
        stats = ann.executor_stats()["tenant"]
        assert stats["rows"] == 100 and stats["rows_left"] <= 10


def test_bytes_in_flight_are_bounded_and_everything_is_answered(
    guarded: Guarded, start: Callable[..., Executor]
) -> None:
    guarded.grant(ann={"max_bytes_in_flight": 1000})
    executor = start()
    meta = raw.exchange_meta(raw.EMBEDDING, (1,), (100,), dtype=raw.INT64)
    clients = [raw.RawClient(guarded.url, greet=False) for _ in range(3)]
    for client in clients:
        client.send(raw.hello(key=guarded.ann))
        assert client.receive().kind == raw.WELCOME
        client.send(b"".join(raw.frame(raw.EXCHANGE, n, meta, bytes(800)) for n in range(1, 11)))
    for client in clients:
        assert [client.receive().request for _ in range(10)] == list(range(1, 11))
    half = raw.frame(raw.EXCHANGE, 11, raw.exchange_meta(2, (2,), (9, 32)), bytes(9 * 32 * 4))
    clients[0].send(half[:-700])  # admitted, and never complete
    stats = _tenants(executor)
    while stats["ann"]["bytes_in_flight"] != 9 * 32 * 4:
        stats = _tenants(executor)
    clients[1].exchange(11, meta, bytes(800))  # waits for it
    clients[0].close()
    assert clients[1].receive().request == 11
    for client in clients[1:]:
        client.close()
    while _tenants(executor)["ann"]["sessions"]:
        time.sleep(0.01)
    assert _tenants(executor)["ann"]["bytes_in_flight"] == 0


def _tenants(executor: Executor) -> dict[str, dict[str, int]]:
    assert executor._guard is not None
    return executor._guard.accounts()  # type: ignore[return-value]


def test_a_client_that_leaves_while_it_is_delayed_is_forgotten(
    guarded: Guarded, start: Callable[..., Executor]
) -> None:
    """Its tenant's rate would keep it waiting, unread, for two hours."""
    guarded.grant(ann={"rows_per_s": 0.1, "burst_rows": 1})
    executor = start()
    with guarded.connect(guarded.ann) as ann:
        ann.lookup(torch.zeros(1, 700, dtype=torch.int64), 1, ())
    while _tenants(executor)["ann"]["sessions"]:
        time.sleep(0.05)


def test_executor_time_runs_out_for_one_tenant_only(
    guarded: Guarded, start: Callable[..., Executor]
) -> None:
    guarded.grant(ann={"executor_s_per_hour": 1e-3})
    start()
    with guarded.connect(guarded.ann) as ann, guarded.connect(guarded.bob) as bob:
        with pytest.raises(QuotaExceeded, match=r"ann has used up its 0\.001 s .* again in \d+ s"):
            for _ in range(10_000):
                ann.lookup(torch.zeros(1, 500, dtype=torch.int64), 1, ())
        assert ann.executor_stats()["tenant"]["executor_s_left"] <= 1e-6
        with pytest.raises(QuotaExceeded):  # nor is anything else handed out
            ann.fetch(1, "the test")
        assert bob.lookup(IDS, 1, ()).shape == (1, 3, 32)


def test_what_is_refused_for_want_of_time_gives_its_memory_back(
    guarded: Guarded, start: Callable[..., Executor]
) -> None:
    guarded.grant(ann={"executor_s_per_hour": 1e-9})
    executor = start(bounds=Bounds(memory_bytes=1 << 20))
    assert executor._server is not None
    with guarded.connect(guarded.ann) as ann, guarded.connect(guarded.bob) as bob:
        with contextlib.suppress(QuotaExceeded):
            ann.lookup(IDS, 1, ())
        for _ in range(50):
            with pytest.raises(QuotaExceeded):
                ann.lookup(torch.zeros(1, 1000, dtype=torch.int64), 1, ())
        assert executor._server.budget.used == 0
        assert bob.lookup(torch.zeros(1, 1000, dtype=torch.int64), 1, ()).shape == (1, 1000, 32)


def test_handing_out_parameters_takes_executor_time_too(
    guarded: Guarded, start: Callable[..., Executor]
) -> None:
    guarded.grant(ann={"executor_s_per_hour": 1e-3})
    start()
    with guarded.connect(guarded.ann) as ann:
        with pytest.raises(QuotaExceeded, match="ann has used up"):
            for _ in range(10_000):
                ann.shipped()
        assert ann.executor_stats()["tenant"]["executor_s"] >= 1e-3


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make(tmp_path_factory.mktemp("certificates"))


def test_certificates_and_keys_together(guarded: Guarded, files: Files) -> None:
    """A certificate that names a tenant stands for a key; any other asks for one besides."""
    with Executor(Weights(tiny.llama(), "tiny"), keys=guarded.store) as executor:
        (url,) = executor.listen(["tls://127.0.0.1:0"], tls=files.serving(mutual=True))
        with connect(url, tls=files.trusting(files.ann)) as base:
            assert base.executor_stats()["tenant"]["name"] == "ann"
        with pytest.raises(AuthenticationFailed):
            connect(url, tls=files.trusting(files.stranger))
        with connect(url, tls=files.trusting(files.stranger), key=guarded.bob) as base:
            assert base.executor_stats()["tenant"]["name"] == "bob"
        with pytest.raises(AuthenticationFailed):  # a wrong key is not made good
            connect(url, tls=files.trusting(files.ann), key="wrong")
