"""The engine without sockets: batches, failures that stay with their cause, clients that leave."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.nn.functional as F

import tiny
from exchanges import exchange, weight_id
from symbiosis.errors import (
    ConnectionLost,
    ExchangeFailed,
    ExchangeRefused,
    InvalidInput,
    SymbiosisError,
)
from symbiosis.executor.engine import Engine
from symbiosis.executor.scheduler import Scheduler
from symbiosis.executor.weights import Weights
from symbiosis.transport.lent import Lent
from symbiosis.wire.exchange import Exchange, Op, Result
from symbiosis.wire.tensors import TensorSpec
from symbiosis.wire.views import View

Outcome = Result | SymbiosisError


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture(scope="module")
def weights() -> Weights:
    return Weights(tiny.llama_with_biases(), "tiny")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def engine(weights: Weights, clock: Clock) -> Engine:
    return Engine(weights, Scheduler("greedy"), max_result_bytes=1 << 20, clock=clock)


def client_of(engine: Engine, name: str = "client") -> int:
    return engine.add_client(name, "inproc")


def submit(engine: Engine, client: int, asked: Exchange) -> list[Outcome]:
    """Where the answer will be; admitted first, as the server does."""
    answers: list[Outcome] = []
    engine.submit(client, asked, engine.admit(asked), answers.append)
    return answers


def submit_and_run(engine: Engine, client: int, asked: Exchange) -> list[Outcome]:
    answers = submit(engine, client, asked)
    engine.run_once()
    return answers


def drain(engine: Engine) -> int:
    count = 0
    while engine.run_once():
        count += 1
    return count


def linear(weights: Weights, x: torch.Tensor, name: str = "0.mlp.up_proj.weight") -> Exchange:
    return exchange(Op.LINEAR, weight_id(weights, name), x)


def right(weights: Weights, asked: Exchange, answers: list[Outcome]) -> bool:
    (answer,) = answers
    assert isinstance(answer, Result), answer
    expected = F.linear(asked.tensors[0], weights[asked.weights[0]].tensor)
    return torch.allclose(answer.tensors[0], expected, rtol=1e-5, atol=1e-6)


def test_clients_of_one_weight_share_a_batch(
    engine: Engine, weights: Weights, clock: Clock
) -> None:
    asked = [linear(weights, torch.randn(n, 32)) for n in (1, 2, 3)]
    answers = [submit(engine, client_of(engine), one) for one in asked]
    clock.now_s += 2.0
    assert engine.run_once()
    assert not engine.run_once()
    for one, answer in zip(asked, answers, strict=True):
        assert right(weights, one, answer)
        assert isinstance(answer[0], Result)
        assert (answer[0].batch_size, answer[0].queue_us) == (3, 2_000_000)
    assert engine.snapshot()["batch_sizes"] == {"3": 1}


def test_a_failure_in_a_batch_stays_with_its_cause(engine: Engine, weights: Weights) -> None:
    """One exchange lies about its tensor's shape, so that the joined product fails."""
    asked = [linear(weights, torch.randn(2, 32)) for _ in range(3)]
    lie = asked[1]._replace(tensors=(torch.randn(2, 7),))
    answers = [submit(engine, client_of(engine), one) for one in (asked[0], lie, asked[2])]
    assert drain(engine) == 1
    assert isinstance(answers[1][0], ExchangeFailed)
    assert "up_proj" in str(answers[1][0])
    assert right(weights, asked[0], answers[0])
    assert right(weights, asked[2], answers[2])


def test_values_out_of_range_do_not_reach_the_others(engine: Engine, weights: Weights) -> None:
    number = weight_id(weights, "embed_tokens.weight")
    good, bad = (exchange(Op.EMBEDDING, number, torch.tensor([n])) for n in (5, 96))
    answers = [submit(engine, client_of(engine), one) for one in (good, bad, good)]
    assert isinstance(answers[1][0], InvalidInput)
    assert engine.run_once()
    for found in (answers[0], answers[2]):
        assert isinstance(found[0], Result)
        assert torch.equal(found[0].tensors[0], weights[number].tensor[5:6])


def test_a_result_over_the_limit_is_refused(engine: Engine, weights: Weights) -> None:
    rows = (1 << 20) // (64 * 4)
    engine.admit(linear(weights, torch.empty(rows, 32)))
    with pytest.raises(InvalidInput, match="fewer rows"):
        engine.admit(linear(weights, torch.empty(rows + 1, 32)))


def test_a_bias_that_does_not_exist_fails_nobody_else(engine: Engine, weights: Weights) -> None:
    """A convolution on a linear weight, seen through a recipe, with bias 12345."""
    good = linear(weights, torch.randn(2, 32))
    bad = exchange(
        Op.CONVOLUTION,
        weight_id(weights, "0.mlp.up_proj.weight"),
        torch.randn(1, 32, 4),
        biases=(12345,),
        recipe=(View.UNSQUEEZE, 1, 2),
        params=(1, 1, 0, 1, 0, 0, 1),
    )
    good_answers = submit(engine, client_of(engine), good)
    try:
        bad_answers = submit(engine, client_of(engine), bad)
    except ExchangeRefused:  # at admission is as good
        bad_answers = []
    drain(engine)
    assert right(weights, good, good_answers)
    assert all(isinstance(answer, ExchangeRefused) for answer in bad_answers)


def test_a_client_that_leaves_takes_its_requests_along(engine: Engine, weights: Weights) -> None:
    asked = linear(weights, torch.randn(2, 32))
    leaving, staying = client_of(engine), client_of(engine)
    dropped = [submit(engine, leaving, asked) for _ in range(3)]
    kept = submit(engine, staying, asked)
    engine.remove_client(leaving)
    assert [type(answers[0]) for answers in dropped] == [ConnectionLost] * 3
    assert drain(engine) == 1
    assert right(weights, asked, kept)
    assert [len(answers) for answers in dropped] == [1, 1, 1]
    engine.remove_client(leaving)
    assert list(engine.snapshot()["clients"]) == [str(staying)]  # type: ignore[call-overload]


def test_each_answer_comes_once_from_many_threads(weights: Weights) -> None:
    engine = Engine(weights, Scheduler("greedy"))
    answers: list[list[Outcome]] = []
    asked = linear(weights, torch.randn(1, 32))

    def work(client: int) -> None:
        for _ in range(10):
            answers.append(submit(engine, client, asked))
            engine.run_once()

    threads = [threading.Thread(target=work, args=(client_of(engine),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    drain(engine)
    assert [len(found) for found in answers] == [1] * 40
    assert all(right(weights, asked, found) for found in answers)


def test_a_held_batch_says_when_it_will_run(weights: Weights, clock: Clock) -> None:
    engine = Engine(weights, Scheduler("lockstep", lockstep_hold_s=0.5), clock=clock)
    assert engine.wait_s() is None
    first, second = client_of(engine), client_of(engine)
    asked = linear(weights, torch.randn(2, 32))
    submit(engine, first, asked)
    submit(engine, second, asked)
    assert engine.run_once()
    late = submit(engine, first, asked)
    assert not engine.run_once()
    assert engine.wait_s() == pytest.approx(0.5)
    clock.now_s += 0.5
    assert engine.wait_s() == 0.0
    assert engine.run_once()
    assert right(weights, asked, late)


def test_counters(engine: Engine, weights: Weights) -> None:
    client = client_of(engine, "ann")
    for _ in range(3):
        submit(engine, client, linear(weights, torch.randn(2, 32)))
    assert engine.snapshot()["waiting"] == 3
    drain(engine)
    engine.refused(client)
    snapshot = engine.snapshot()
    mine = snapshot["clients"][str(client)]  # type: ignore[index]
    assert (mine["name"], mine["exchanges"], mine["rows"], mine["refused"]) == ("ann", 3, 6, 1)
    assert (snapshot["exchanges"], snapshot["waiting"]) == (3, 0)
    assert snapshot["operations"] == {"linear": 3}
    assert snapshot["policy"] == "greedy"
    assert snapshot["clients_seen"] == 1


def test_times_are_those_of_computing(
    engine: Engine, weights: Weights, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU goes on after the call; here it would take two seconds. Its failures come then, too. A
    client of this process is not waited for."""
    client, here = engine.add_client("ann", "unix"), engine.add_client("bob", "inproc")

    def gpu_is_done() -> None:
        clock.now_s += 2

    monkeypatch.setattr(weights, "device", torch.device("cuda", 0))
    monkeypatch.setattr(weights, "wait", gpu_is_done)
    (answer,) = submit_and_run(engine, client, linear(weights, torch.randn(2, 32)))
    assert isinstance(answer, Result)
    assert answer.compute_us == 2_000_000
    assert engine.stats.clients[client].compute_s == 2

    def gpu_fails() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(weights, "wait", gpu_fails)
    (answer,) = submit_and_run(engine, client, linear(weights, torch.randn(2, 32)))
    assert isinstance(answer, ExchangeFailed)
    (answer,) = submit_and_run(engine, here, linear(weights, torch.randn(2, 32)))
    assert isinstance(answer, Result) and answer.compute_us == 0


def test_empty_inputs_have_empty_results(engine: Engine, weights: Weights) -> None:
    asked = linear(weights, torch.empty(0, 32))
    answers = submit(engine, client_of(engine), asked)
    drain(engine)
    assert isinstance(answers[0], Result)
    assert answers[0].tensors[0].shape == (0, 64)
    assert asked.specs == (TensorSpec(torch.float32, (0, 32)),)


def test_who_is_at_work_is_announced() -> None:
    """Who has had something computed since the last look, and who computes by itself."""
    weights = Weights(tiny.llama(), "tiny", lend=True)
    engine = Engine(weights, Scheduler("greedy"))
    assert weights.lender is not None
    lent = Lent(os.dup(weights.lender.descriptor), weights.lender.table())
    first, second, borrower = (client_of(engine) for _ in range(3))
    x = torch.randn(1, 32)

    def seen(*working: int) -> int:
        for client in working:
            submit(engine, client, linear(weights, x))
        drain(engine)
        engine.look_at_company()
        return lent.clients

    assert seen() == 0
    assert seen(first) == 1
    assert seen(first, second) == 2
    assert seen() == 0
    engine.stats.clients[borrower].lent = True  # by whom, is not known
    assert (seen(), seen(first), seen(borrower)) == (1, 2, 1)
    engine.remove_client(borrower)
    assert seen() == 0


def test_threads_stay_awake_for_a_lone_decoder(
    engine: Engine, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who sends many rows has work of its own, for which it wants the cores. A client of this
    process has them anyway."""
    said: list[bool] = []
    monkeypatch.setattr("symbiosis.executor.engine.sleep_at_once", said.append)
    first, second, here = (engine.add_client(x, x) for x in ("unix", "tcp", "inproc"))

    def sent(client: int, rows: int) -> list[bool]:
        said.clear()
        submit_and_run(engine, client, linear(weights, torch.randn(rows, 32)))
        return list(said)

    assert sent(first, 1) == sent(first, 32) == []
    assert sent(first, 33) == [True]
    assert sent(first, 400) == sent(here, 1) == []
    assert sent(first, 2) == [False]
    assert sent(here, 400) == []
    sent(second, 1)
    engine.look_at_company()
    assert said == [True]
    assert sent(first, 100) == [True]
    assert sent(second, 1) == [True], "others are at work"


def test_clients_are_told_whether_others_are_at_work(engine: Engine, weights: Weights) -> None:
    first, second = client_of(engine), client_of(engine)

    def told(client: int) -> bool:
        (answer,) = submit_and_run(engine, client, linear(weights, torch.randn(1, 32)))
        assert isinstance(answer, Result)
        return answer.shared

    assert not told(first)
    engine.look_at_company()
    assert not told(first)
    assert not told(second), "not looked at yet"
    engine.look_at_company()
    assert told(first)
    engine.look_at_company()
    assert not told(first)


def test_who_borrows_is_at_work_while_its_process_uses_the_processor() -> None:
    engine = Engine(Weights(tiny.llama(), "tiny", lend=True), Scheduler("greedy"))
    assert engine.weights.lender is not None
    lent = Lent(os.dup(engine.weights.lender.descriptor), engine.weights.lender.table())
    idle = subprocess.Popen(["sleep", "600"])
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        clients = []
        for process in (idle, busy, busy):  # the second has two sessions
            clients.append(client_of(engine))
            stats = engine.stats.clients[clients[-1]]
            stats.lent, stats.pid = True, process.pid
        engine.look_at_company()
        assert lent.clients == 2  # nothing is known of either
        assert _announced(engine, lent, 1)
        for client in clients[1:]:
            engine.remove_client(client)
        engine.look_at_company()
        assert lent.clients == 0
        submit(engine, clients[0], linear(engine.weights, torch.randn(1, 32)))
        drain(engine)
        engine.look_at_company()
        assert lent.clients == 1
        idle.kill()
        idle.wait()
        engine.look_at_company()
        assert lent.clients == 1  # as long as its session is there
    finally:
        for process in (idle, busy):
            process.kill()
            process.wait()


def _announced(engine: Engine, lent: Lent, count: int) -> bool:
    """So many are at work by one of the looks of the next minute."""
    for _ in range(120):
        time.sleep(0.5)
        engine.look_at_company()
        if lent.clients == count:
            return True
    return False
