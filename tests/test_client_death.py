"""Clients that are killed, and one that asks for more memory than there is: what they held is
released, and the others do not notice. The executor and its clients are processes."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import threading
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

import psutil
import pytest
import torch

import dying_clients
import raw
import tiny
import tiny_files
from bad_frames import EMBED, weight
from command_line import Served, finish, serve
from dying_clients import FIRST
from raw import RawClient
from symbiosis import Executor, connect
from symbiosis.errors import ExchangeFailed
from symbiosis.wire.exchange import Op

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tiny_files.build_model(tmp_path_factory.mktemp("models") / "tiny")
    found = serve(folder, tmp_path_factory.mktemp("run"))
    yield found
    found.process.terminate()
    assert finish(found.process).code == 0


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["symbiosis.api", "dying_clients"])
    return context


class Held:
    """What an executor's process holds: descriptors, shared mappings, clients, exchanges."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._process = psutil.Process(served.process.pid)

    def now(self) -> tuple[int, int, int, int]:
        with connect(self._served.unix, name="observer", arena_bytes=0) as session:
            stats = session.executor_stats()
            maps = Path(f"/proc/{self._process.pid}/maps").read_text()
            fds, arenas = self._process.num_fds(), maps.count("memfd:symbiosis")
            return fds, arenas, len(stats["clients"]), int(stats["waiting"])

    def check_released(self, before: tuple[int, int, int, int]) -> None:
        deadline_s = time.monotonic() + 20
        while (found := self.now()) != before:
            assert time.monotonic() < deadline_s, f"{before} before, {found} after"


def check_healthy(served: Served) -> None:
    with connect(served.unix) as session:
        ids = torch.arange(8).view(2, 4)
        table = session.fetch(FIRST, "a test")
        assert torch.equal(session.lookup(ids, FIRST, ()), table[ids])


@pytest.mark.parametrize(
    ("transport", "arena_bytes"), [("unix", 1 << 30), ("unix", 0), ("tcp", 0)], ids=str
)
def test_many_are_killed_in_the_middle_of_exchanges(
    served: Served, processes: ForkServerContext, transport: str, arena_bytes: int
) -> None:
    held, chance = Held(served), random.Random(3)
    before = held.now()
    url = served.unix if transport == "unix" else served.tcp
    clients = []
    for _ in range(8):
        theirs, ours = processes.Pipe(duplex=False)
        client = processes.Process(
            target=dying_clients.work, args=(url, arena_bytes, ours), daemon=True
        )
        client.start()
        ours.close()
        clients.append((client, theirs))
    for _, theirs in clients:
        assert theirs.recv() == 1
        theirs.close()
    at_work = held.now()
    assert at_work[2] == before[2] + 8
    assert (at_work[1] >= before[1] + 8) == bool(arena_bytes)
    for client, _ in clients:
        time.sleep(chance.uniform(0, 0.01))
        client.kill()
    for client, _ in clients:
        client.join()
    held.check_released(before)
    check_healthy(served)


def test_some_are_killed_in_the_middle_of_a_payload(
    served: Served, processes: ForkServerContext
) -> None:
    """Only one result of that size would fit, and nobody gets to ask for it."""
    held = Held(served)
    before = held.now()
    memory = psutil.Process(served.process.pid).memory_info().rss
    clients = []
    for url in (served.unix, served.tcp) * 2:
        theirs, ours = processes.Pipe(duplex=False)
        client = processes.Process(
            target=dying_clients.half_a_payload, args=(url, ours), daemon=True
        )
        client.start()
        clients.append((client, theirs))
    for client, theirs in clients:
        assert theirs.recv() == 1
        client.kill()
        client.join()
    held.check_released(before)
    assert psutil.Process(served.process.pid).memory_info().rss < memory + (32 << 20)
    check_healthy(served)


def test_out_of_memory_is_one_clients_failure(served: Served) -> None:
    """Address space for 200 MB more than the executor has. First the input does not fit, then
    the result; a neighbour goes on meanwhile, and the same client goes on afterwards."""
    pid = served.process.pid
    stop = threading.Event()
    wrong: list[object] = []

    def neighbour() -> None:
        try:
            while not stop.is_set():
                check_healthy(served)
        except BaseException as error:  # noqa: BLE001
            wrong.append(error)

    working = threading.Thread(target=neighbour)
    limits = resource.prlimit(pid, resource.RLIMIT_AS)
    with connect(served.tcp) as session:
        working.start()
        space = psutil.Process(pid).memory_info().vms + (200 << 20)
        resource.prlimit(pid, resource.RLIMIT_AS, (space, limits[1]))
        try:
            with pytest.raises(ExchangeFailed, match="out of memory"):
                session.exchange(Op.MATMUL, 2, (), (torch.zeros(900_000, 64),))
            with pytest.raises(ExchangeFailed, match="memory"):
                session.lookup(torch.zeros(2_000_000, dtype=torch.int32), FIRST, ())
            table = session.fetch(FIRST, "a test")
            assert torch.equal(session.lookup(torch.tensor([5]), FIRST, ()), table[[5]])
        finally:
            resource.prlimit(pid, resource.RLIMIT_AS, limits)
            stop.set()
            working.join()
    assert wrong == []


def test_a_shutdown_answers_what_is_queued_and_waits_until_it_is_taken(tmp_path: Path) -> None:
    """Three answers of 4 MB, to a client that reads nothing until the executor is told to stop;
    then it is told why nothing more comes."""
    model = tiny.llama()
    executor = Executor.of(model)
    (url,) = executor.listen([f"unix://{tmp_path}/base.sock"])
    ids = torch.randint(0, tiny.VOCABULARY, (1 << 15,), dtype=torch.int32)
    meta = raw.exchange_meta(raw.EMBEDDING, weight(executor, EMBED), (1 << 15,), dtype=raw.INT32)
    with RawClient(url) as client:
        for request in range(3):
            client.exchange(request, meta, ids.numpy().tobytes())
        with connect(url) as observer:
            while observer.executor_stats()["exchanges"] < 1:
                pass
        stopping = threading.Thread(target=executor.close)
        stopping.start()
        answers = [client.receive() for _ in range(2)]
        last = answers[-1]
        while last.kind == raw.RESULT:
            last = client.receive()
            answers.append(last)
        stopping.join()
    assert (last.kind, last.code) == (raw.ERROR, "connection-lost")
    expected = model.get_input_embeddings().weight.detach()[ids].numpy().tobytes()
    assert [answer.request for answer in answers[:-1]] == list(range(len(answers) - 1))
    assert all(answer.payload == expected for answer in answers[:-1])
    assert not os.path.exists(f"{tmp_path}/base.sock")
