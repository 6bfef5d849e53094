"""What one client may take up: slow ones, many at once, and memory that is shared by all."""

from __future__ import annotations

import json
import resource
import socket
import threading
import time
from typing import TYPE_CHECKING

import pytest
import torch

import raw
import tiny
from bad_frames import UP, linear, rows_of
from exchanges import weight_id
from raw import RawClient
from symbiosis import connect
from symbiosis.executor.bounds import Bounds, Budget, Pace, Progress, Reading

if TYPE_CHECKING:
    from conftest import Serve

# Pure: time is an argument


def test_pace() -> None:
    pace = Pace()
    assert not pace.is_slow("a", 0, 0.0, 10, 100)
    assert not pace.is_slow("a", 0, 9.9, 10, 100)
    assert pace.is_slow("a", 999, 10.0, 10, 100)
    assert not pace.is_slow("a", 999 + 2000, 25.0, 10, 100), "a new window has begun"
    assert not pace.is_slow("b", 2999, 90.0, 10, 100), "something else is under way"
    assert not pace.is_slow(None, 2999, 190.0, 10, 100)
    assert not pace.is_slow("b", 2999, 290.0, 10, 100)


def overdue(progress: Progress, now_s: float, **state: object) -> str | None:
    known = {"greeted": True, "reading": Reading.NOTHING}
    idle = dict.fromkeys(("unsent", "holds", "crowded"), False)
    return progress.overdue(Bounds(), now_s, **{**known, **idle, **state})  # type: ignore[arg-type]


def test_a_slow_link_lives_and_a_trickle_does_not() -> None:
    """A gigabyte at 2 kB/s takes six days and is welcome, unless others wait for the memory."""
    link, trickle = Progress(0.0), Progress(0.0)
    for now_s in range(1, 3600):
        link.received += 2000
        assert overdue(link, now_s, reading=Reading.PAYLOAD) is None
    ends = []
    for now_s in range(1, 60):
        trickle.received += 1
        ends.append(overdue(trickle, now_s, reading=Reading.PAYLOAD))
    assert ends[:10] == [None] * 10
    assert "less than 1024" in str(ends[10])
    crowded = []
    for now_s in range(3600, 3612):
        link.received += 2000
        crowded.append(overdue(link, now_s, reading=Reading.PAYLOAD, crowded=True))
    assert any(crowded)


def test_heads_and_greetings_have_a_time() -> None:
    progress = Progress(100.0)
    assert overdue(progress, 109.0, greeted=False) is None
    assert "HELLO" in str(overdue(progress, 110.1, greeted=False))
    for now_s in range(100, 110):
        progress.received += 1
        assert overdue(progress, now_s, reading=Reading.HEAD) is None
    assert "not complete" in str(overdue(progress, 111, reading=Reading.HEAD))
    for now_s in range(200, 300):
        progress.frames += 1  # one after the other
        assert overdue(progress, now_s, reading=Reading.HEAD) is None


def test_a_reader_has_longer() -> None:
    progress = Progress(0.0)
    for now_s in range(60):
        assert overdue(progress, now_s, unsent=True) is None
    assert "answers" in str(overdue(progress, 60, unsent=True))


def test_a_reader_has_no_longer_than_a_sender_while_others_wait_for_its_memory() -> None:
    progress = Progress(0.0)

    def told(begin_s: int, end_s: int, **state: bool) -> list[str | None]:
        found = []
        for now_s in range(begin_s, end_s):
            progress.sent += 100_000
            found.append(overdue(progress, now_s, unsent=True, **state))
        return found

    assert not any(told(0, 600, holds=True)), "nobody waits"
    assert not any(told(600, 1200, crowded=True)), "what it has not taken is no memory of theirs"
    urgent = told(1200, 1211, holds=True, crowded=True)
    assert urgent[:10] == [None] * 10
    assert "1.04858e+06" in str(urgent[10])


def test_budget_is_first_come_first_served() -> None:
    budget: Budget[str] = Budget(100)
    assert budget.take("a", 60)
    assert not budget.take("b", 50)
    assert not budget.take("c", 10), "b is first, although c would fit"
    assert budget.next_in_line() is None
    budget.give(60)
    assert budget.next_in_line() == "b"
    assert budget.take("b", 50)
    assert budget.next_in_line() == "c"
    assert budget.take("c", 10)
    assert not budget.crowded
    assert budget.used == 60


def test_what_is_larger_than_the_budget_goes_alone() -> None:
    budget: Budget[str] = Budget(100)
    assert budget.take("a", 1)
    assert not budget.take("giant", 1000)
    budget.give(1)
    assert budget.next_in_line() == "giant"
    assert budget.take("giant", 1000)
    assert not budget.take("a", 1)
    budget.leave("a")
    assert not budget.crowded


# A real server


QUICK = Bounds(greeting_s=0.3, frame_s=0.3, window_s=0.3, answer_s=0.6)


def patient(url: str) -> bool:
    """Somebody who behaves is served as ever."""
    with connect(url) as session, torch.no_grad():
        return torch.equal(
            session.model()(tiny.tokens()).logits, tiny.llama()(tiny.tokens()).logits
        )


def test_who_does_not_greet_is_left(serve: Serve) -> None:
    _, url = serve(tiny.llama(), tcp=True, bounds=QUICK)
    with connect(url) as idle, RawClient(url, greet=False) as silent:
        half = raw.hello()
        with RawClient(url, greet=False) as begun:
            begun.send(half[: len(half) // 2])
            for client in (silent, begun):
                told = client.receive()
                assert told.code == "connection-lost"
                assert "HELLO" in json.loads(told.meta)["message"]
                assert client.hung_up()
        assert idle.executor_stats()["waiting"] == 0, "who has greeted may be silent"


@pytest.mark.parametrize("cut", [10, 40, 100])
def test_a_trickle_of_bytes_is_ended(cut: int, serve: Serve) -> None:
    """In the header, in the meta section and in the payload: a byte now and then does not help."""
    base, url = serve(tiny.llama(), tcp=True, bounds=QUICK)
    frame = raw.frame(raw.EXCHANGE, 5, linear(base), rows_of(1.0))
    with RawClient(url) as slow:
        slow.send(frame[:cut])
        sent, ended = cut, False
        while not ended and sent < len(frame) - 1:
            slow.socket.settimeout(0.05)
            try:
                ended = bool(slow.socket.recv(4096))
            except TimeoutError:
                slow.send(frame[sent : sent + 1])
                sent += 1
        assert ended, "it was let go on"
        assert patient(url)


def test_who_does_not_take_answers_is_ended(serve: Serve) -> None:
    """Its answers are freed, and the others are served all the while."""
    base, url = serve(tiny.llama(), tcp=True, bounds=QUICK)
    rows = 4000
    meta = raw.exchange_meta(raw.LINEAR, (weight_id(base, UP),), (rows, 32))
    greedy = RawClient(url)
    greedy.socket.settimeout(20)
    greedy.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with pytest.raises((ConnectionError, TimeoutError)):  # it sends and does not read
        for _ in range(400):
            greedy.exchange(1, meta, rows_of(1.0, rows))
    greedy.close()
    assert patient(url)
    assert base._server is not None
    assert base._server.budget.used == 0


def test_a_long_batch_is_no_clients_fault(serve: Serve) -> None:
    """The server looks at no socket meanwhile: that time does not count."""
    base, url = serve(tiny.llama(), tcp=True, bounds=QUICK)
    frame = raw.frame(raw.EXCHANGE, 5, linear(base), rows_of(1.0))
    lock = base._engine._device_lock
    with RawClient(url) as other, connect(url) as busy:
        other.send(frame[:100])
        with lock:  # a batch that takes long
            asking = threading.Thread(target=lambda: busy.model()(tiny.tokens()))
            asking.start()
            time.sleep(1.0)
        other.send(frame[100:])
        assert other.receive().kind == raw.RESULT
        asking.join()


# Connections


def test_a_crowd_of_strangers(serve: Serve) -> None:
    """They hold no door shut: who greets gets in, and the oldest of them go."""
    _, url = serve(tiny.llama(), tcp=True, bounds=Bounds(strangers=8))
    crowd = [RawClient(url, greet=False) for _ in range(40)]
    assert patient(url)
    told = crowd[0].receive()
    assert told.code == "connection-failed"
    for client in crowd:
        client.close()


def test_no_more_clients_than_that(serve: Serve) -> None:
    base, url = serve(tiny.llama(), tcp=True, bounds=Bounds(connections=3))
    clients = [RawClient(url) for _ in range(3)]
    with RawClient(url, greet=False) as refused:
        told = refused.receive()
        assert told.code == "connection-failed"
        assert "3 clients already" in json.loads(told.meta)["message"]
    clients.pop().close()
    while len(base.status()["clients"]) > 2:  # type: ignore[arg-type]
        pass  # until the executor has noticed
    assert patient(url)
    for client in clients:
        client.close()


def test_no_descriptors_left(serve: Serve) -> None:
    """The listener would be ready for ever: the loop must not spin, and go on afterwards."""
    base, url = serve(tiny.llama(), tcp=True)
    assert patient(url)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with RawClient(url) as client:
        waiting = [socket.socket() for _ in range(3)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (5, limits[1]))
        try:
            host, port = url.removeprefix("tcp://").split(":")
            for each in waiting:
                each.connect((host, int(port)))
            while not base._server._deaf:  # type: ignore[union-attr]
                pass
            before = time.thread_time_ns(), time.process_time_ns()
            time.sleep(0.9)
            used_ns = time.process_time_ns() - before[1]
            assert used_ns < 0.3e9, "it spins"
            client.exchange(1, linear(base), rows_of(1.0))
            assert client.receive().kind == raw.RESULT, "who is in is served"
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for each in waiting:
            each.sendall(raw.hello())
            each.settimeout(30)
            assert each.recv(2) == b"SY", "who waited is let in"
            each.close()
    assert patient(url)


# Memory


def test_memory_is_bounded_and_nobody_waits_for_ever(serve: Serve) -> None:
    """Twelve clients at once with more than the budget: all are answered, never more is held."""
    rows = 2000
    size = rows * (32 + 64) * 4
    base, url = serve(tiny.llama(), tcp=True, bounds=Bounds(memory_bytes=2 * size + 1))
    meta = raw.exchange_meta(raw.LINEAR, (weight_id(base, UP),), (rows, 32))
    assert base._server is not None
    budget, seen, failed = base._server.budget, [0], []

    def work(number: int) -> None:
        try:
            with RawClient(url) as client:
                sender = threading.Thread(
                    target=lambda: [client.exchange(n, meta, rows_of(1.0, rows)) for n in range(10)]
                )
                sender.start()
                for request in range(10):
                    answer = client.receive()
                    seen.append(budget.used)
                    assert answer.request == request
                    assert len(answer.payload) == rows * 64 * 4
                sender.join()
        except BaseException as error:
            failed.append(error)
            raise

    workers = [threading.Thread(target=work, args=(n,)) for n in range(12)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert not failed
    assert max(seen) <= 2 * size + 1
    assert patient(url)
    assert budget.used == 0
    assert not budget.crowded


def test_who_dies_in_a_payload_gives_it_back(serve: Serve) -> None:
    rows = 2000
    base, url = serve(tiny.llama(), tcp=True, bounds=Bounds(memory_bytes=1 << 20))
    meta = raw.exchange_meta(raw.LINEAR, (weight_id(base, UP),), (rows, 32))
    frame = raw.frame(raw.EXCHANGE, 1, meta, rows_of(1.0, rows))
    holders = [RawClient(url) for _ in range(3)]
    for holder in holders:
        holder.send(frame[: len(frame) // 2])
    with RawClient(url) as waits:
        waits.send(frame)
        assert base._server is not None
        while not base._server.budget.crowded:
            pass
        for holder in holders:
            holder.close()
        assert waits.receive().kind == raw.RESULT
    assert patient(url)
    assert base._server.budget.used == 0


def test_a_slow_holder_makes_room_when_others_wait(serve: Serve) -> None:
    """At a rate that is enough while nobody waits."""
    rows = 2000
    bounds = QUICK._replace(memory_bytes=1 << 20, least_rate=10.0, crowded_rate=1e6)
    base, url = serve(tiny.llama(), tcp=True, bounds=bounds)
    meta = raw.exchange_meta(raw.LINEAR, (weight_id(base, UP),), (rows, 32))
    frame = raw.frame(raw.EXCHANGE, 1, meta, rows_of(1.0, rows))
    slow, stop = RawClient(url), threading.Event()
    slow.send(frame[:300])

    def trickle() -> None:
        at = 300
        while not stop.wait(0.05):
            try:
                slow.send(frame[at : at + 10])
            except OSError:
                return
            at += 10

    sender = threading.Thread(target=trickle)
    sender.start()
    time.sleep(1.0)
    with RawClient(url) as other:
        other.send(frame)
        assert other.receive().kind == raw.RESULT
    stop.set()
    sender.join()
    assert slow.hung_up()
    slow.close()


def test_a_slow_reader_in_line_holds_nobody_up(serve: Serve) -> None:
    """It waits for memory and does not take its answers: it loses its place, not the others."""
    rows = 2000
    size = rows * (32 + 64) * 4
    base, url = serve(tiny.llama(), tcp=True, bounds=Bounds(memory_bytes=3 * size))
    meta = raw.exchange_meta(raw.LINEAR, (weight_id(base, UP),), (rows, 32))
    stuck = RawClient(url)
    stuck.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    stuck.socket.settimeout(1)
    with pytest.raises(TimeoutError):
        for _ in range(100):
            stuck.exchange(1, meta, rows_of(1.0, rows))
    with RawClient(url) as other:
        for request in range(5):
            other.exchange(request, meta, rows_of(1.0, rows))
            assert other.receive().request == request
    stuck.close()
