"""Sessions: closing, threads, interruptions, fetching, statistics; and channels that misbehave."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import tiny
from exchanges import weight_id
from symbiosis import Executor, Session, connect
from symbiosis.errors import (
    ConnectionLost,
    ExchangeRefused,
    FetchRefused,
    InvalidInput,
    ProtocolError,
)
from symbiosis.wire.exchange import NO_BIAS, Exchange, Op, Result
from symbiosis.wire.frames import Json
from symbiosis.wire.tensors import empty_payload

QUERY, KEY, VALUE, UP = (
    "0.self_attn.q_proj.weight",
    "0.self_attn.k_proj.weight",
    "0.self_attn.v_proj.weight",
    "0.mlp.up_proj.weight",
)


def product(session: Session, executor: Executor, x: torch.Tensor, name: str = UP) -> torch.Tensor:
    return session.product(Op.LINEAR, x, weight_id(executor, name), (), NO_BIAS, forward=True)


def expected(executor: Executor, x: torch.Tensor, name: str = UP) -> torch.Tensor:
    return F.linear(x, executor.weights[weight_id(executor, name)].tensor)


# Closing


@pytest.mark.parametrize("transport", ["socket", "inproc"])
def test_a_closed_session_says_what_to_do(
    executor: Executor, base_url: str, transport: str
) -> None:
    session = connect(base_url if transport == "socket" else executor)
    model = session.model()
    folder = session.model_folder()
    session.close()
    session.close()
    assert not folder.exists()
    assert "closed" in repr(session)
    with pytest.raises(ConnectionLost, match=r"closed.*connect\(\)"):
        model(tiny.tokens())
    with pytest.raises(ConnectionLost, match=r"closed.*connect\(\)"):
        session.executor_stats()


def test_the_executor_forgets_a_session_that_closed(executor: Executor, base_url: str) -> None:
    with connect(base_url, name="ann"), connect(executor, name="bob") as bob:
        names = {client["name"] for client in bob.executor_stats()["clients"].values()}
        assert names == {"ann", "bob"}
    with connect(base_url) as late:
        assert len(late.executor_stats()["clients"]) == 1


@pytest.mark.parametrize("priority", ["", "high", None])
def test_an_unknown_priority_is_refused(base_url: str, priority: str) -> None:
    with pytest.raises(ValueError, match="auto, interactive or training"):
        connect(base_url, priority=priority)  # type: ignore[arg-type]


# The data path


@pytest.mark.parametrize("transport", ["socket", "inproc"])
def test_many_threads_get_their_own_answers(
    executor: Executor, base_url: str, transport: str
) -> None:
    session = connect(base_url if transport == "socket" else executor)
    wrong: list[int] = []

    def work(number: int) -> None:
        for step in range(25):
            x = torch.full((1 + number % 3, 32), float(number * 100 + step))
            for name in (QUERY, KEY, VALUE, UP):
                if not torch.equal(
                    product(session, executor, x, name), expected(executor, x, name)
                ):
                    wrong.append(number)

    with session:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_products_on_one_input_become_one_exchange(session: Session, executor: Executor) -> None:
    def step() -> None:
        x = torch.randn(3, 32)
        for name in (QUERY, KEY, VALUE):
            assert torch.equal(product(session, executor, x, name), expected(executor, x, name))
        product(session, executor, torch.randn(2, 32))

    step()
    assert session.stats().grouped == 0
    before = session.stats().exchanges
    step()
    assert session.stats().exchanges - before == 2
    assert session.stats().grouped == 2


def test_an_input_changed_in_place_is_another_input(session: Session, executor: Executor) -> None:
    for change in (lambda x: None, lambda x: x.mul_(3), lambda x: x[0].zero_()):
        x = torch.randn(3, 32)
        product(session, executor, x, QUERY)
        change(x)
        assert torch.equal(product(session, executor, x, KEY), expected(executor, x, KEY))
        product(session, executor, torch.randn(2, 32))


def test_an_answer_belongs_to_the_caller(session: Session, executor: Executor) -> None:
    for _ in range(2):
        x = torch.randn(3, 32)
        product(session, executor, x, QUERY).zero_()
        assert torch.equal(product(session, executor, x, KEY), expected(executor, x, KEY))
        product(session, executor, torch.randn(2, 32))


def test_a_refused_exchange_leaves_the_session_usable(session: Session, executor: Executor) -> None:
    with pytest.raises(InvalidInput, match="does not fit"):
        product(session, executor, torch.randn(2, 7))
    with pytest.raises(ExchangeRefused):
        session.exchange(Op.LINEAR, 999, (), (torch.randn(2, 32),))
    x = torch.randn(2, 32)
    assert torch.equal(product(session, executor, x), expected(executor, x))


@pytest.mark.parametrize("tcp", [False, True])  # by the arena, and all in one payload
def test_an_input_over_the_executors_limit_is_told_so(
    serve: Callable[..., tuple[Executor, str]], tcp: bool
) -> None:
    executor, url = serve(tiny.llama(), tcp=tcp, max_payload_bytes=1 << 16)
    with connect(url) as session:
        with pytest.raises(InvalidInput, match="65536 bytes: use a smaller batch"):
            product(session, executor, torch.randn(1 << 16, 32))
        x = torch.randn(2, 32)
        assert torch.equal(product(session, executor, x), expected(executor, x))


def test_a_session_finds_a_restarted_executor_again(
    serve: Callable[..., tuple[Executor, str]],
) -> None:
    """Nothing of a session lives in the executor, so its successor serves as well."""
    executor, url = serve(tiny.llama())
    session = connect(url, retry_s=0)
    x = torch.randn(2, 32)
    product(session, executor, x)
    executor.close()
    with pytest.raises(ConnectionLost):
        product(session, executor, x)
    executor.listen([url])
    assert torch.equal(product(session, executor, x), expected(executor, x))
    session.close()


# Statistics


def test_statistics_add_up(session: Session, executor: Executor) -> None:
    product(session, executor, torch.randn(2, 32))
    session.product(
        Op.MATMUL, torch.randn(3, 64), weight_id(executor, UP), (), NO_BIAS, forward=False
    )
    stats = session.stats()
    assert (stats.exchanges, stats.forward, stats.mean_batch) == (2, 1, 1.0)
    assert stats.bytes_sent == 4 * (2 * 32 + 3 * 64)
    assert stats.bytes_received == 4 * (2 * 64 + 3 * 32)
    assert stats.wait_s >= stats.compute_s >= 0


@pytest.mark.parametrize(
    ("priority", "gradients", "seen"),
    [
        ("auto", True, "training"),
        ("auto", False, "interactive"),
        ("training", False, "training"),
        ("interactive", True, "interactive"),
    ],
)
def test_priorities(priority: str, gradients: bool, seen: str) -> None:
    channel = Scripted(["x"])
    session = Session(lambda hello: channel, "scripted", priority=priority)  # type: ignore[arg-type]
    with torch.set_grad_enabled(gradients):
        session.exchange(Op.LINEAR, 1, (), (torch.zeros(1, 2),))
    assert channel.seen[0].priority.name.lower() == seen


# Fetching


def test_a_weight_is_fetched_once_and_kept(session: Session, executor: Executor) -> None:
    number = weight_id(executor, UP)
    first = session.fetch(number, "a test")
    assert torch.equal(first, executor.weights[number].tensor)
    assert session.fetch(number, "another") is first
    assert session.stats().fetched_bytes == 4 * first.numel()
    (mine,) = session.executor_stats()["clients"].values()
    assert mine["fetches"] == 1


def test_a_refused_fetch_names_who_asked(serve: Callable[..., tuple[Executor, str]]) -> None:
    _, url = serve(tiny.llama(), fetch="deny")
    with connect(url) as session:
        with pytest.raises(FetchRefused, match=r"DoRA's norms needs the whole of .*--fetch allow"):
            session.fetch(1, "DoRA's norms")
        weight = session.model().lm_head.weight
        with pytest.raises(FetchRefused, match=r"training lm_head\.weight"):
            weight.requires_grad_(True)
        with pytest.raises(FetchRefused, match="norm"):
            weight.norm()


# Channels that misbehave


class Scripted:
    """A channel that does one scripted thing after another: an exception to raise, or answers."""

    lent = None

    def __init__(self, script: list[object], welcome: Json | None = None) -> None:
        self.welcome: Json = welcome or {
            "weights": [{"id": 1, "names": ["w"], "shape": [2, 2]}],
            "model": "scripted",
            "digest": "0" * 64,
        }
        self.script = list(script)
        self.seen: list[Exchange] = []
        self.closed = False

    def exchange(self, exchange: Exchange) -> Result:
        self.seen.append(exchange)
        self._step()
        return Result(tuple(torch.zeros(1, 2) for _ in exchange.weights), 0, 0, 1)

    def request(self, question: Json) -> tuple[Json, torch.Tensor]:
        step = self._step()
        return (step if isinstance(step, dict) else {}), empty_payload(2)

    def close(self) -> None:
        self.closed = True

    def _step(self) -> object:
        step = self.script.pop(0)
        if isinstance(step, BaseException):
            raise step
        return step


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ProtocolError("out of step")])
@pytest.mark.parametrize("what", ["exchange", "request"])
def test_a_channel_out_of_step_is_not_used_again(error: BaseException, what: str) -> None:
    """After an interruption an answer may still be under way: it would answer something else."""
    broken, fresh = Scripted([error]), Scripted(["x"])
    channels = [broken, fresh]
    session = Session(lambda hello: channels.pop(0), "scripted")
    with pytest.raises(type(error)):
        if what == "exchange":
            session.exchange(Op.LINEAR, 1, (), (torch.zeros(1, 2),))
        else:
            session.executor_stats()
    session.exchange(Op.LINEAR, 1, (), (torch.zeros(1, 2),))
    assert broken.closed
    assert len(fresh.seen) == 1


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b", "..", ""])
def test_a_file_must_have_a_plain_name(name: str) -> None:
    session = Session(lambda hello: Scripted([{"files": {name: 2}}]), "scripted")
    with pytest.raises(ProtocolError):
        session.model_folder()
    session.close()


@pytest.mark.parametrize("files", [None, [], "x", {"config.json": "2"}, {"config.json": 99}])
def test_a_malformed_list_of_files(files: object) -> None:
    session = Session(lambda hello: Scripted([{"files": files}]), "scripted")
    with pytest.raises(ProtocolError):
        session.model_folder()
    session.close()


@pytest.mark.parametrize("weights", [None, 5, [1], [{"id": "x"}], [{"id": 1, "names": ["w"]}]])
def test_a_malformed_welcome(weights: object) -> None:
    with pytest.raises(ProtocolError, match="table of weights"):
        Session(lambda hello: Scripted([], {"weights": weights, "digest": "0"}), "scripted")


def test_files_that_did_not_come_are_asked_for_again() -> None:
    """Each connection is scripted alike, whether the session keeps its first or opens another."""
    answers: list[object] = [InvalidInput("not now"), {"files": {"config.json": 2}}]
    channel = Scripted(answers)
    session = Session(lambda hello: channel, "scripted")
    with pytest.raises(InvalidInput):
        session.model_folder()
    assert (session.model_folder() / "config.json").exists()
    session.close()


def test_a_gpu_s_own_kernels_are_no_part_of_the_wait(
    base_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are waited for before; the CPU says that it is a GPU."""
    waits: list[torch.device] = []

    class Stream:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def synchronize(self) -> None:
            waits.append(self.device)

    with connect(base_url) as session:
        model = session.model()
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
        with torch.no_grad():
            model(tiny.tokens())
        assert len(waits) == session.stats().exchanges > 0
