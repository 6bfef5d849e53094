"""The administration socket: its own verbs, behind its own door."""

from __future__ import annotations

import json
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import raw
import tiny
from symbiosis import Executor, Session, connect
from symbiosis.errors import (
    AuthenticationFailed,
    ConnectionFailed,
    ConnectionLost,
    KeyStoreError,
    ProtocolError,
    SymbiosisError,
)
from symbiosis.executor import keystore
from symbiosis.executor.bounds import Bounds
from symbiosis.executor.weights import Weights
from symbiosis.transport.sockets import SocketChannel

IDS = torch.tensor([[1, 2, 3]])


class Run:
    """An executor with tenants and an administration socket."""

    def __init__(self, folder: Path) -> None:
        self.store = folder / "keys.json"
        self.url = f"unix://{folder}/base.sock"
        self.admin = f"unix://{folder}/admin.sock"
        self.ann, self.ann_key = keystore.create(self.store, "ann")
        self.bob, _ = keystore.create(self.store, "bob")

    def ask(self, verb: object, **fields: object) -> dict[str, Any]:
        channel = SocketChannel(self.admin, {"protocol": 1, "client": "test"})
        try:
            answer, payload = channel.request({"admin": verb, **fields})
        finally:
            channel.close()
        assert not len(payload)
        return answer

    def connect(self, key: str, **options: object) -> Session:
        return connect(self.url, key=key, retry_s=0, **options)  # type: ignore[arg-type]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    found = Run(tmp_path)
    bounds = Bounds(connections=6)
    with Executor(Weights(tiny.llama(), "tiny"), keys=found.store, bounds=bounds) as executor:
        executor.listen([found.url], admin=found.admin)
        yield found


def test_only_the_operator_can_reach_it(run: Run) -> None:
    path = run.admin.removeprefix("unix://")
    assert stat.S_IMODE(Path(path).stat().st_mode) == 0o600
    with Executor(Weights(tiny.llama(), "tiny")) as other:
        with pytest.raises(ConnectionFailed, match=r"unix:///path\.sock only, not tcp://"):
            other.listen(["tcp://127.0.0.1:0"], admin="tcp://127.0.0.1:0")
        with pytest.raises(ConnectionFailed, match="it is in use"):
            other.listen(["tcp://127.0.0.1:0"], admin=run.admin)


def test_status_shows_everybody(run: Run) -> None:
    with run.connect(run.ann, name="a") as ann, run.connect(run.bob, name="b"):
        ann.lookup(IDS, 1, ())
        status = run.ask("status")
        told = {(c["name"], c["tenant"]) for c in status["clients"].values()}
        assert told == {("a", "ann"), ("b", "bob")}
        assert status["model"] == "tiny" and status["draining"] is False


def test_tenants_shows_use_and_limits(run: Run) -> None:
    with run.connect(run.ann) as ann:
        ann.lookup(IDS, 1, ())
        ann.lookup(IDS, 1, ())
        tenants = run.ask("tenants")["tenants"]
        while tenants["ann"]["executor_s"] == 0:  # counted after the answer has gone out
            tenants = run.ask("tenants")["tenants"]
        assert tenants["ann"]["sessions"] == 1 and tenants["ann"]["rows"] == 6
        assert tenants["bob"]["sessions"] == 0 and tenants["bob"]["rows"] == 0


def test_reload_ends_what_was_revoked_at_once(run: Run) -> None:
    with run.connect(run.ann) as ann, run.connect(run.bob) as bob:
        ann.lookup(IDS, 1, ())
        keystore.revoke(run.store, run.ann_key.id)
        assert run.ask("reload") == {"ended": 1} or "ann" not in _names(run)
        with pytest.raises((AuthenticationFailed, ConnectionLost)):
            ann.lookup(IDS, 1, ())
        assert bob.lookup(IDS, 1, ()).shape == (1, 3, 32)


def _names(run: Run) -> set[str]:
    return {client["tenant"] for client in run.ask("status")["clients"].values()}


def test_reload_refuses_a_malformed_store_and_keeps_the_old(run: Run) -> None:
    run.store.write_text("{")
    with pytest.raises(KeyStoreError, match="malformed"):
        run.ask("reload")
    with run.connect(run.ann) as ann:
        assert ann.lookup(IDS, 1, ()).shape == (1, 3, 32)


def test_drain_takes_no_new_sessions_and_leaves_the_old(run: Run) -> None:
    with run.connect(run.ann) as ann:
        assert run.ask("drain") == {"sessions": 1}
        with pytest.raises(ConnectionFailed, match="takes no new sessions"):
            run.connect(run.bob)
        with pytest.raises(AuthenticationFailed):  # strangers learn nothing of it
            run.connect("wrong")
        assert ann.lookup(IDS, 1, ()).shape == (1, 3, 32)
        assert run.ask("status")["draining"] is True
    while run.ask("status")["clients"]:
        time.sleep(0.01)


def test_disconnect_ends_one_session(run: Run) -> None:
    with run.connect(run.ann) as ann, run.connect(run.ann) as other:
        assert run.ask("disconnect", client=ann.welcome["session"]) == {}
        with pytest.raises(ConnectionLost):
            ann.lookup(IDS, 1, ())
        assert ann.lookup(IDS, 1, ()).shape == (1, 3, 32)  # it may come back
        assert other.lookup(IDS, 1, ()).shape == (1, 3, 32)


@pytest.mark.parametrize("client", [9999, -1, "x", None, True, [1]])
def test_disconnecting_nobody_is_an_error(run: Run, client: object) -> None:
    with run.connect(run.ann), pytest.raises(SymbiosisError, match="there is no client"):
        run.ask("disconnect", client=client)
    assert run.ask("status")


@pytest.mark.parametrize("verb", ["get", "", None, 7, "stop", "STATUS", {"a": 1}])
def test_the_list_of_verbs_is_closed(run: Run, verb: object) -> None:
    with pytest.raises(ProtocolError, match="there are status, tenants, reload, drain, disconnect"):
        run.ask(verb)


def test_what_clients_ask_is_not_answered_there(run: Run) -> None:
    for question in ({"get": "weight", "id": 1}, {"get": "stats"}, {"get": "files"}):
        with raw.RawClient(run.admin, greet=False) as client:
            client.send(raw.hello())
            welcome = json.loads(client.receive().meta)
            assert "weights" not in welcome and "model" not in welcome
            client.send(raw.json_frame(raw.REQUEST, 1, question))
            assert client.receive().code == "protocol"
    with raw.RawClient(run.admin, greet=False) as client:
        client.send(raw.hello())
        client.receive()
        client.exchange(1, raw.exchange_meta(raw.EMBEDDING, (1,), (1,), dtype=raw.INT64), bytes(8))
        assert client.receive().code == "protocol"
        assert client.hung_up()


@pytest.mark.parametrize("verb", ["status", "tenants", "reload", "drain", "disconnect"])
def test_the_verbs_are_not_answered_at_the_door_for_clients(run: Run, verb: str) -> None:
    with raw.RawClient(run.url, greet=False) as client:
        client.send(raw.hello(key=run.ann))
        client.receive()
        client.send(raw.json_frame(raw.REQUEST, 1, {"admin": verb, "client": 1}))
        assert client.receive().code in ("request-refused", "protocol")
    assert run.ask("status")["draining"] is False


def test_the_operator_comes_in_when_the_house_is_full(run: Run) -> None:
    sessions = [run.connect(run.ann) for _ in range(6)]
    with pytest.raises(ConnectionFailed):
        run.connect(run.bob)
    assert len(run.ask("status")["clients"]) == 6
    for session in sessions:
        session.close()
