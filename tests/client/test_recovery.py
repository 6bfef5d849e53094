"""Lost connections: what is asked again, for how long, and what is not."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import pytest
import torch
from test_session import UP, Scripted, expected, product

import tiny
from symbiosis import Executor, Session, connect
from symbiosis.errors import (
    ConnectionFailed,
    ConnectionLost,
    DamagedFrame,
    InvalidInput,
    ModelError,
    ProtocolError,
    QuotaExceeded,
    SymbiosisError,
)
from symbiosis.wire.exchange import Op


def scripted(*scripts: list[object] | BaseException, retry_s: float = 20.0) -> Session:
    """Connections that do one scripted thing after another; an exception in place of a script
    is a connection that cannot be opened."""
    left = list(scripts)

    def open_next(hello: object) -> Scripted:
        script = left.pop(0)
        if isinstance(script, BaseException):
            raise script
        return Scripted(script)

    return Session(open_next, "scripted", retry_s=retry_s)


def ask(session: Session) -> torch.Tensor:
    return session.exchange(Op.LINEAR, 1, (), (torch.zeros(1, 2),))


def test_an_exchange_survives_what_passes(caplog: pytest.LogCaptureFixture) -> None:
    """One line when it is lost, one when it is back; the seeded random numbers are untouched."""
    session = scripted(
        [ConnectionLost("gone")],
        ConnectionFailed("nobody"),
        [ProtocolError("damaged")],
        [ConnectionLost("shutting down")],
        ["fine"],
    )
    random.seed(1), torch.manual_seed(1)
    before = random.getstate(), torch.get_rng_state()
    assert ask(session).shape == (1, 2)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    lost, back = (record.message for record in caplog.records)
    assert "gone; trying again for up to 20 s" in lost
    assert "back" in back
    assert session.stats().exchanges == 1


def test_a_request_survives_too() -> None:
    session = scripted([ConnectionLost("gone")], [{"answer": 1}])
    assert session.executor_stats() == {"answer": 1}


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), InvalidInput("no"), SymbiosisError("internal"), ModelError("no")]
)
def test_what_does_not_pass_is_not_tried_again(error: BaseException) -> None:
    session = scripted([error, "not asked for"], ["not asked for"])
    with pytest.raises(type(error)):
        ask(session)


def test_a_refusal_after_a_loss_is_the_answer() -> None:
    session = scripted([ConnectionLost("gone")], [InvalidInput("no"), "fine"])
    with pytest.raises(InvalidInput):
        ask(session)
    ask(session)


def test_a_mistake_is_not_repeated_for_long() -> None:
    session = scripted(*([ProtocolError("bug")] for _ in range(3)), ["never asked for"])
    with pytest.raises(ProtocolError, match="bug"):
        ask(session)


def test_damage_is_not_a_mistake() -> None:
    session = scripted(*([DamagedFrame("bits")] for _ in range(6)), ["fine"])
    ask(session)


def test_a_full_house_may_be_so_by_the_lost_connection() -> None:
    """The executor notices that one only later. At the first connection it is an answer."""
    full = QuotaExceeded("2 sessions already")
    ask(scripted([ConnectionLost("gone")], full, full, ["fine"]))
    session = scripted([ConnectionLost("gone")], *[full] * 50, retry_s=0.3)
    with pytest.raises(ConnectionFailed, match="2 sessions already"):
        ask(session)
    with pytest.raises(QuotaExceeded):
        scripted(full)
    session = scripted([ConnectionLost("gone")], [QuotaExceeded("no time left"), "not asked for"])
    with pytest.raises(QuotaExceeded, match="no time left"):
        ask(session)


def test_patience_ends() -> None:
    session = scripted([ConnectionLost("gone")], *[ConnectionFailed("no")] * 50, retry_s=0.3)
    with pytest.raises(ConnectionFailed, match="no"):
        ask(session)
    session = scripted([ConnectionLost("gone")], ["fine"], retry_s=0)
    with pytest.raises(ConnectionLost, match="gone"):
        ask(session)


def test_closing_ends_the_waiting(tmp_path: object) -> None:
    """From another thread, long before patience is at an end."""
    session = scripted([ConnectionLost("gone")], *[ConnectionFailed("no")] * 1000, retry_s=600)
    raised: list[BaseException] = []

    def work() -> None:
        try:
            ask(session)
        except ConnectionLost as error:
            raised.append(error)
        except ConnectionFailed as error:
            raised.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    while session._channel is not None:
        time.sleep(0.001)
    session.close()
    worker.join(60)
    assert len(raised) == 1


def test_another_model_at_the_address_is_no_recovery(
    serve: Callable[..., tuple[Executor, str]],
) -> None:
    executor, url = serve(tiny.llama())
    with connect(url) as session:
        product(session, executor, torch.randn(2, 32))
        executor.close()
        with Executor.of(tiny.gpt2()) as other:
            other.listen([url])
            with pytest.raises(ModelError, match="no longer hosts"):
                product(session, executor, torch.randn(2, 32))


@pytest.mark.parametrize("rows", [3, 1000])
def test_an_exchange_waits_for_an_executor_that_is_restarted(
    serve: Callable[..., tuple[Executor, str]], rows: int
) -> None:
    """Large inputs lie in the old connection's arena, and are sent anew in the next one's."""
    executor, url = serve(tiny.llama())
    x = torch.randn(rows, 32)
    with connect(url) as session:
        kept = [product(session, executor, x) for _ in range(3)]
        executor.close()
        later = threading.Timer(0.5, executor.listen, [[url]])
        later.start()
        found = product(session, executor, x)
        later.join()
        wanted = expected(executor, x, UP)
        assert all(torch.equal(y, wanted) for y in (*kept, found, product(session, executor, x)))
