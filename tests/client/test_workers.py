"""Remote models in other processes: DataLoader workers, forks; each opens its own connection."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading

import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

import tiny
from symbiosis import Executor, Session, connect
from symbiosis.errors import SymbiosisError

pytestmark = pytest.mark.timeout(120)


class Embedded(Dataset[torch.Tensor]):
    """A data set that looks its tokens up with the model, in the worker."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        with torch.no_grad():
            return self.model(tiny.tokens(1, 4, seed=index)).logits[0]


def expected(local: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack([local(tiny.tokens(1, 4, seed=n)).logits[0] for n in range(4)])


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_data_set_may_hold_the_model(
    session: Session, local: PreTrainedModel, method: str
) -> None:
    model = session.model()
    model(tiny.tokens())
    loader = DataLoader(
        Embedded(model), batch_size=2, num_workers=1, multiprocessing_context=method
    )
    assert torch.equal(torch.cat(list(loader)), expected(local))
    assert torch.equal(model(tiny.tokens()).logits, local(tiny.tokens()).logits)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_in_the_middle_of_an_exchange_of_another_thread(
    session: Session, local: PreTrainedModel
) -> None:
    model = session.model()
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with session._lock:
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert entered.wait(60)
        child = os.fork()
        if not child:
            signal.alarm(60)
            same = torch.equal(model(tiny.tokens()).logits, local(tiny.tokens()).logits)
            os._exit(0 if same else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        leave.set()
        thread.join()
    assert torch.equal(model(tiny.tokens()).logits, local(tiny.tokens()).logits)


def test_a_child_after_a_fork_uses_a_connection_of_its_own(
    session: Session, local: PreTrainedModel
) -> None:
    model = session.model()
    wanted = local(tiny.tokens()).logits
    assert torch.equal(model(tiny.tokens()).logits, wanted)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def child() -> None:
        right = [torch.equal(model(tiny.tokens()).logits, wanted) for _ in range(3)]
        theirs.send((all(right), len(session.executor_stats()["clients"]), os.getpid()))

    process = context.Process(target=child)
    process.start()
    for _ in range(3):
        assert torch.equal(model(tiny.tokens()).logits, wanted)
    assert ours.poll(60)
    right, clients, pid = ours.recv()
    process.join()
    assert right
    assert clients == 2
    assert pid != os.getpid()
    assert process.exitcode == 0


def test_closing_in_a_child_leaves_the_parents_connection(
    session: Session, local: PreTrainedModel
) -> None:
    model = session.model()
    process = multiprocessing.get_context("fork").Process(target=session.close)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert torch.equal(model(tiny.tokens()).logits, local(tiny.tokens()).logits)
    assert session.model_folder().exists()


def test_a_session_in_the_executors_process_does_not_travel() -> None:
    with Executor.of(tiny.llama()) as executor, connect(executor) as session:
        loader = DataLoader(
            Embedded(session.model()), num_workers=1, multiprocessing_context="spawn"
        )
        with pytest.raises(SymbiosisError, match=r"listen on a unix:// or tcp://"):
            next(iter(loader))
