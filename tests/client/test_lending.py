"""Clients that compute with weights which the executor lends; `test_exactness` has the numbers."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

import tiny
import tiny_files
from command_line import Served, finish, run
from command_line import serve as serve_process
from symbiosis import Executor, Session, connect
from symbiosis.client import borrowed
from symbiosis.client.remote_weight import RemoteWeight
from symbiosis.errors import FetchRefused, ModelError, SymbiosisError
from symbiosis.executor import weights
from symbiosis.executor.engine import Engine
from symbiosis.transport import device_memory

Serve = Callable[..., tuple[Executor, str]]
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def url(serve: Serve) -> str:
    """An executor that lends a tiny Llama."""
    return serve(tiny.llama(), lend=True)[1]


def up(model: PreTrainedModel) -> RemoteWeight:
    weight = model.get_submodule(UP).weight
    assert type(weight) is RemoteWeight
    return weight


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


def train(model: PreTrainedModel) -> torch.Tensor:
    """One step's gradient of a norm, which is the client's own."""
    norm = model.get_submodule("model.norm").weight.requires_grad_(True)
    ids = tiny.tokens()
    return torch.autograd.grad(model(ids, labels=ids).loss, [norm])[0]


def test_nothing_is_sent_and_nothing_is_copied(url: str, local: PreTrainedModel) -> None:
    with connect(url) as session:
        model = session.model()
        assert torch.equal(logits(model, tiny.tokens()), logits(local, tiny.tokens()))
        assert torch.equal(train(model), train(local))
        stats = session.stats()
        assert (stats.exchanges, stats.fetched_bytes) == (0, 0)
        numbers = up(model).here
        assert numbers is not None
        assert "memfd:symbiosis-weights" in file_of(numbers)
        (client,) = session.executor_stats()["clients"].values()
        assert client["lent"]


def file_of(numbers: torch.Tensor) -> str:
    """The inode and the name of the file that a tensor lies in."""

    def holds(line: str) -> bool:
        first, last = (int(each, 16) for each in line.split()[0].split("-"))
        return first <= numbers.data_ptr() < last

    maps = Path("/proc/self/maps").read_text().splitlines()
    (found,) = (" ".join(line.split()[4:]) for line in maps if holds(line))
    return found


def test_reading_a_weight_costs_nothing(url: str, local: PreTrainedModel) -> None:
    with connect(url) as session:
        weight = up(session.model())
        assert torch.equal(weight.fetch("a test"), up_of(local))
        assert torch.equal(weight.norm(), up_of(local).norm())
        assert session.stats().fetched_bytes == 0


def up_of(local: PreTrainedModel) -> torch.Tensor:
    found = local.get_submodule(UP).weight
    assert isinstance(found, torch.Tensor)
    return found.detach()


def test_what_a_client_changes_is_its_own(url: str, local: PreTrainedModel) -> None:
    with connect(url) as mine, connect(url) as theirs:
        model = mine.model()
        with torch.no_grad():
            model.get_submodule(UP).weight.mul_(2)
            model.get_submodule(UP).weight.data += 1
        changed = model.get_submodule(UP).weight
        assert torch.equal(changed.detach(), 2 * up_of(local) + 1)
        assert torch.equal(logits(theirs.model(), tiny.tokens()), logits(local, tiny.tokens()))


@pytest.mark.parametrize(
    "terms", [{"borrow": False}, {"verify": 0.5}, {"privacy": "noise"}], ids=str
)
def test_who_does_not_borrow_sends(url: str, terms: dict[str, object]) -> None:
    with connect(url, **terms) as session:  # type: ignore[arg-type]
        model = session.model()
        assert up(model).here is None
        logits(model, tiny.tokens())
        assert session.stats().exchanges > 0


@pytest.mark.parametrize(
    "options", [{"tcp": True, "lend": True}, {"fetch": "deny", "lend": True}, {}]
)
def test_who_is_lent_nothing_sends(
    serve: Serve, options: dict[str, object], local: PreTrainedModel
) -> None:
    _, url = serve(tiny.llama(), **options)
    with connect(url) as session:
        model = session.model()
        assert torch.equal(logits(model, tiny.tokens()), logits(local, tiny.tokens()))
        assert session.stats().exchanges > 0
        (client,) = session.executor_stats()["clients"].values()
        assert not client["lent"]


def test_fetch_deny_is_obeyed(serve: Serve) -> None:
    _, url = serve(tiny.llama(), lend=True, fetch="deny")
    with connect(url) as session, pytest.raises(FetchRefused):
        up(session.model()).fetch("a test")


def test_another_dtype_is_computed_by_the_executor(url: str) -> None:
    with connect(url) as session:
        model = session.model(dtype=torch.bfloat16)
        assert up(model).here is None
        logits(model, tiny.tokens())
        assert session.stats().exchanges > 0


def test_a_pinned_model(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every lent weight is compared before it is used."""
    with connect(url) as session:
        digest = session.digest
    with connect(url, expect_digest=digest) as session:
        assert up(session.model()).here is not None
        assert session.stats().exchanges == 0
    wrong = torch.zeros(0)
    monkeypatch.setattr(
        "symbiosis.transport.lent.Lent.tensor",
        lambda self, weight, shape, device: wrong.new_ones(shape),
    )
    with connect(url, expect_digest=digest) as session, pytest.raises(ModelError, match="digest"):
        session.model()


def test_the_memory_outlives_session_and_executor(serve: Serve, local: PreTrainedModel) -> None:
    executor, url = serve(tiny.llama(), lend=True)
    with connect(url) as session:
        model = session.model()
    executor.close()
    assert torch.equal(logits(model, tiny.tokens()), logits(local, tiny.tokens()))


def test_a_forked_child_computes_on(url: str, local: PreTrainedModel) -> None:
    with connect(url) as session:
        model = session.model()
        child = os.fork()
        if not child:
            same = torch.equal(logits(model, tiny.tokens()), logits(local, tiny.tokens()))
            os._exit(0 if same else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_worker_process_borrows_too(url: str) -> None:
    with connect(url) as session:
        again: Session = pickle.loads(pickle.dumps(session))  # noqa: S301
        with again:
            assert up(again.model()).here is not None
    with connect(url, borrow=False) as session:
        again = pickle.loads(pickle.dumps(session))  # noqa: S301
        with again:
            assert up(again.model()).here is None


def test_no_descriptor_stays_open(url: str) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    with connect(url):
        pass
    before = count()
    for _ in range(5):
        with connect(url) as session:
            session.model()
    assert count() <= before + 1  # the executor may not have seen the last one leave


@pytest.fixture
def on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are lent lie in a device's memory; the device is the CPU."""
    monkeypatch.setattr(weights, "_block", device_memory.allocate)


def test_weights_of_a_device(
    on_a_device: None,
    serve: Serve,
    local: PreTrainedModel,
    told: Callable[[Executor, int], None],
) -> None:
    executor, url = serve(tiny.llama(), lend=True)
    with connect(url) as session:
        model = session.model()
        assert torch.equal(logits(model, tiny.tokens()), logits(local, tiny.tokens()))
        assert torch.equal(train(model), train(local))
        weight, kept = up(model), executor.weights[1].tensor
        assert torch.equal(weight.norm(), up_of(local).norm())
        assert session.stats().exchanges == 0
        assert session.stats().fetched_bytes == 0
        assert "/torch_" in file_of(kept)
        assert weight.here is not None
        assert file_of(weight.here) == file_of(kept)
        told(executor, 2)
        logits(model, tiny.tokens(1, 4))
        assert session.stats().exchanges == 0


def test_another_process_attaches_a_device_s_memory(
    on_a_device: None, serve: Serve, local: PreTrainedModel, tmp_path: Path
) -> None:
    """Its logits; and it leaves, while the executor goes on."""
    _, url = serve(tiny.llama(), lend=True)
    code = (
        "import symbiosis, sys, torch\n"
        f"with symbiosis.connect({url!r}) as session:\n"
        "    model = session.model()\n"
        f"    ids = torch.tensor({tiny.tokens().tolist()})\n"
        f"    torch.save(model(ids).logits, {str(tmp_path / 'logits.pt')!r})\n"
        "    assert session.stats().exchanges == 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(local, tiny.tokens()))
    with connect(url, borrow=False) as session:
        assert torch.equal(logits(session.model(), tiny.tokens()), logits(local, tiny.tokens()))


def test_who_cannot_attach_a_device_s_memory_sends(
    on_a_device: None, serve: Serve, local: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, url = serve(tiny.llama(), lend=True)
    tried = []

    def attach(shared: object, device: torch.device) -> torch.Tensor:
        tried.append(device)
        raise RuntimeError("not in this container")

    monkeypatch.setattr(device_memory, "attach", attach)
    with connect(url) as session:
        model = session.model()
        assert torch.equal(logits(model, tiny.tokens()), logits(local, tiny.tokens()))
        assert session.stats().exchanges > 0
        assert len(tried) == 1


def test_who_computes_on_another_device_sends(
    on_a_device: None, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, url = serve(tiny.llama(), lend=True)
    monkeypatch.setattr(device_memory, "is_on", lambda shared, device: False)
    with connect(url) as session:
        weight = up(session.model())
        assert weight.here is None
        weight.norm()
        assert session.stats().fetched_bytes > 0


def test_a_device_s_memory_has_gone_with_its_executor(on_a_device: None, serve: Serve) -> None:
    executor, url = serve(tiny.llama(), lend=True)
    with connect(url) as session, connect(url) as idle:
        session.model()
        session._drop_channel()
        session.executor_stats()  # it is there: nothing has gone
        executor.close()
        again = Executor(weights.Weights(tiny.llama(), "tiny", lend=True))
        again.listen([url])
        try:
            for _ in range(2):
                with pytest.raises(ModelError, match="connect again"):
                    session.executor_stats()
            idle.executor_stats()  # had nothing of it yet, and takes what is there now
            model = idle.model()
            assert logits(model, tiny.tokens()).isfinite().all()
            assert idle.stats().exchanges == 0
        finally:
            again.close()


def test_a_device_s_memory_is_not_lent_to_tenants(
    on_a_device: None, serve: Serve, tmp_path: Path
) -> None:
    with pytest.raises(SymbiosisError, match="not lent to tenants"):
        serve(tiny.llama(), lend=True, keys=tmp_path / "keys")
    with pytest.raises(SymbiosisError, match="not lent to tenants"):  # before it is loaded
        Executor.load(str(tmp_path), device="meta", lend=True, keys=tmp_path / "keys")


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Served]:
    """`symbiosis serve --lend --supervise`."""
    model = tiny_files.build_model(tmp_path / "tiny")
    found = serve_process(model, tmp_path, "--lend", "--supervise")
    yield found
    found.process.terminate()
    finish(found.process)


def test_a_killed_executor_leaves_the_memory_to_the_next(supervised: Served) -> None:
    ids = tiny.tokens()
    with connect(supervised.unix) as session:
        model = session.model()
        wanted = logits(model, ids)
        (victim,) = psutil.Process(supervised.process.pid).children()
        victim.kill()
        assert torch.equal(logits(model, ids), wanted)
        session.executor_stats()  # by the next one
        with connect(supervised.unix) as another:
            assert another.welcome["pid"] != victim.pid
            again = another.model()
            assert torch.equal(logits(again, ids), wanted)
            assert another.stats().exchanges == 0
            here, there = up(model).here, up(again).here
            assert here is not None
            assert there is not None
            assert file_of(here) == file_of(there)


def test_a_job_of_the_command_line_borrows(supervised: Served, tmp_path: Path) -> None:
    """The adapter is the one that is trained over TCP, where nothing is lent."""
    data = tiny_files.write_training_data(tmp_path / "data.jsonl")
    for out, url in {"lent": supervised.unix, "sent": supervised.tcp}.items():
        done = run(
            *("finetune", "--base", url, "--data", data, "--out", tmp_path / out),
            *("--steps", 4, "--seed", 5, "--batch-size", 2, "--threads", 1),
        )
        assert done.code == 0, done.err
    lent, sent = (
        load_file(tmp_path / out / "adapter_model.safetensors") for out in ("lent", "sent")
    )
    assert lent.keys() == sent.keys()
    assert all(torch.equal(lent[name], sent[name]) for name in sent)


def test_an_idle_session_of_another_process_is_no_company(supervised: Served) -> None:
    code = f"import symbiosis as s; b = s.connect({supervised.unix!r}); print(b.borrowed); input()"
    idle = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert idle.stdout is not None
        assert "Borrowed" in idle.stdout.readline()
        with connect(supervised.unix) as session:
            assert session.borrowed is not None
            assert len(session.executor_stats()["clients"]) == 2
            model, ids = session.model(), tiny.tokens()
            until_s = time.monotonic() + 60
            while session.borrowed.clients != 1:  # this process computes all the time
                assert time.monotonic() < until_s
                logits(model, ids)
            assert idle.poll() is None
    finally:
        idle.kill()
        idle.communicate()


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Callable[[Executor, int], None]:
    """Says how many clients are at work, and nobody else does. Weights count as large."""
    monkeypatch.setattr(Engine, "look_at_company", lambda self: None)
    monkeypatch.setattr(borrowed, "_WORTH_JOINING", 1)
    return at_work


def at_work(executor: Executor, clients: int) -> None:
    assert executor.weights.lender is not None
    executor.weights.lender.announce(clients)


def test_the_executor_that_is_there_says_who_is_at_work(
    serve: Serve, told: Callable[[Executor, int], None]
) -> None:
    """Not the one that lent the memory, and has gone."""
    executor, url = serve(tiny.llama(), lend=True)
    with connect(url) as session:
        assert session.borrowed is not None
        told(executor, 2)
        assert session.borrowed.clients == 2
        executor.close()
        again = Executor(weights.Weights(tiny.llama(), "tiny", lend=True))
        again.listen([url])
        try:
            session.executor_stats()
            told(again, 1)
            assert session.borrowed.clients == 1
        finally:
            again.close()


def test_another_session_puts_nobody_to_sleep_for_long(
    url: str, local: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[bool] = []
    monkeypatch.setattr(borrowed, "sleep_at_once", said.append)
    with connect(url) as session:
        model = session.model()
        for _ in range(3):
            with connect(url, borrow=False):  # which puts this process's threads to sleep
                pass
            said.clear()
            logits(model, tiny.tokens())
            assert said == [False]


def test_few_rows_join_those_of_others_where_weights_are_large(
    serve: Serve,
    local: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
    told: Callable[[Executor, int], None],
) -> None:
    executor, url = serve(tiny.llama(), lend=True)
    few, many = tiny.tokens(1, 4), tiny.tokens(5, 9)

    def exchanges(ids: torch.Tensor) -> int:
        before = session.stats().exchanges
        assert torch.equal(logits(model, ids), logits(local, ids))
        return session.stats().exchanges - before

    with connect(url) as session:
        model = session.model()
        told(executor, 1)
        assert (exchanges(few), exchanges(many)) == (0, 0)
        told(executor, 2)
        assert exchanges(few) > 0
        assert exchanges(many) == 0
        assert torch.equal(train(model), train(local))
        told(executor, 1)
        assert exchanges(few) == 0
        monkeypatch.setattr(borrowed, "_WORTH_JOINING", 1 << 20)
        told(executor, 2)
        assert exchanges(few) == 0


def test_generation_goes_on_when_company_comes_and_goes(
    serve: Serve, local: PreTrainedModel, told: Callable[[Executor, int], None]
) -> None:
    executor, url = serve(tiny.llama(), lend=True)
    ids = tiny.tokens(1, 4)
    wanted = local.generate(ids, max_new_tokens=40, do_sample=False)
    with connect(url) as session:
        model = session.model()
        seen = 0

        def change(module: torch.nn.Module, args: object) -> None:
            nonlocal seen
            seen += 1
            told(executor, 1 + seen // 8 % 2)

        model.register_forward_pre_hook(change)
        assert torch.equal(model.generate(ids, max_new_tokens=40, do_sample=False), wanted)
        assert session.stats().exchanges > 0
        assert session.plan(), "no chain was learned in the eight tokens of company"
