"""kill -9 of the executor, again and again, under jobs that go on: nothing is lost.

The executor is a real `symbiosis serve --supervise`; the oracle, the same job undisturbed.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers.generation.streamers import BaseStreamer

import tiny
import tiny_files
from command_line import Served, finish, run, serve
from symbiosis import Executor, connect
from symbiosis.errors import SymbiosisError
from symbiosis.jobs import finetune
from symbiosis.jobs.spec import FinetuneSpec

pytestmark = pytest.mark.timeout(180)

KILLS = int(os.environ.get("SYMBIOSIS_KILLS", "20"))


class Killer:
    """Kills the executor a moment after it is asked to, which is in the middle of something."""

    def __init__(self, supervisor: int, kills: int, seed: int) -> None:
        self._supervisor = psutil.Process(supervisor)
        self.left = kills
        self._random = random.Random(seed)
        self._timer: threading.Timer | None = None
        self.killed: list[int] = []

    def soon(self, within_s: float) -> None:
        """Within so many seconds, unless the last killing is still to come."""
        if self.left and (self._timer is None or not self._timer.is_alive()):
            self.left -= 1
            self._timer = threading.Timer(self._random.uniform(0, within_s), self._kill)
            self._timer.start()

    def join(self) -> None:
        if self._timer is not None:
            self._timer.join()

    def _kill(self) -> None:
        """The next one, if the last is still on its way out."""
        while True:
            for child in self._supervisor.children():
                if child.pid not in self.killed:
                    child.send_signal(signal.SIGKILL)
                    self.killed.append(child.pid)
                    return


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_files.build_model(tmp_path_factory.mktemp("models") / "tiny", hidden=128)


@pytest.fixture(scope="module")
def supervised(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    found = serve(model_folder, tmp_path_factory.mktemp("run"), "--supervise")
    yield found
    found.process.terminate()
    finish(found.process)


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_a_fine_tuning_run_ends_in_the_same_adapter(
    supervised: Served, transport: str, tmp_path: Path
) -> None:
    """Bit for bit, and so does every loss on the way. Over the UNIX socket inputs and results lie
    in shared memory that goes with each connection."""
    data = tiny_files.write_training_data(tmp_path / "train.jsonl")
    url = supervised.unix if transport == "unix" else supervised.tcp

    def spec(name: str) -> FinetuneSpec:
        return FinetuneSpec(
            base=url, data=data, out=tmp_path / name, steps=5 * KILLS, batch_size=8,
            options={"lora_dropout": 0.1}, save_steps=10, learning_rate=0.01,
        )  # fmt: skip

    calm = finetune.run(spec("calm"))
    killer = Killer(supervised.process.pid, KILLS, seed=1)
    losses: list[float | None] = []

    def on_event(progress: finetune.Progress) -> None:
        losses.append(progress.loss)
        killer.soon(within_s=0.04)

    disturbed = finetune.run(spec("disturbed"), on_event)
    killer.join()
    assert len(killer.killed) == KILLS
    assert disturbed.train_loss == calm.train_loss
    assert disturbed.exchanges == calm.exchanges
    first, second = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("calm", "disturbed")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


class PerToken(BaseStreamer):  # type: ignore[misc]
    """Calls a function for each token."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call

    def put(self, value: torch.Tensor) -> None:
        self._call()

    def end(self) -> None:
        pass


def test_a_generation_says_the_same(supervised: Served) -> None:
    """Greedily, and drawn with a seed; with chains, which are learned and compared."""
    killer = Killer(supervised.process.pid, KILLS, seed=2)
    with connect(supervised.unix) as session:
        model, ids = session.model(), torch.tensor([[5, 9, 33, 120, 7]])

        def decode(sampling: bool, each: Callable[[], None]) -> list[int]:
            torch.manual_seed(4)
            found = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=sampling,
                min_new_tokens=80, max_new_tokens=80, streamer=PerToken(each),
            )  # fmt: skip
            return list(map(int, found[0]))

        calm = [decode(sampling, lambda: None) for sampling in (False, True)]
        while killer.left:
            for sampling in (False, True):
                disturbed = decode(sampling, lambda: killer.soon(within_s=0.02))
                assert disturbed == calm[sampling]
        assert session.plan()
    killer.join()
    assert len(killer.killed) == KILLS


def test_a_supervisor_that_is_told_to_stop_stops(model_folder: Path, tmp_path: Path) -> None:
    """After deaths, with two threads in each child; in order, with its socket removed and no
    process left."""
    server = serve(model_folder, tmp_path, "--supervise", "--threads", 2)
    supervisor = psutil.Process(server.process.pid)
    with connect(server.unix) as session:
        model, ids = session.model(), torch.randint(3, 300, (16, 200))
        first = model(ids).logits
        for _ in range(3):
            before = session.executor_stats()["pid"]
            os.kill(before, signal.SIGKILL)
            assert torch.equal(model(ids).logits, first)
            assert session.executor_stats()["pid"] != before
    (child,) = supervisor.children()
    server.process.send_signal(signal.SIGINT)
    ended = finish(server.process)
    assert ended.code == 0, ended
    assert ended.err.count("was killed by SIGKILL") == 3
    assert "Traceback" not in ended.err
    assert not child.is_running()
    assert not (tmp_path / "base.sock").exists()


def test_a_supervisor_that_is_killed_takes_its_executor_along(
    model_folder: Path, tmp_path: Path
) -> None:
    server = serve(model_folder, tmp_path, "--supervise")
    (child,) = psutil.Process(server.process.pid).children()
    server.process.kill()
    child.wait(30)
    finish(server.process)
    with Executor.of(tiny.llama()) as successor:  # both addresses are free
        assert successor.listen([server.unix, server.tcp])


def test_a_model_that_cannot_be_hosted_is_not_tried_again(tmp_path: Path) -> None:
    url = f"unix://{tmp_path}/base.sock"
    said = run("serve", tmp_path, "--supervise", "--listen", url)
    assert "cannot host" in said.error
    assert not (tmp_path / "base.sock").exists()


def test_a_gpu_is_looked_for_in_the_child(model_folder: Path, tmp_path: Path) -> None:
    """CUDA that has begun in a parent is of no use after a fork."""
    address = ("--listen", f"unix://{tmp_path}/base.sock")
    done = run("serve", model_folder, *address, "--supervise", "--device", "cuda:9")
    assert (done.code, "no usable CUDA device" in done.error) == (1, True)
    code = (
        "import os, sys, torch\n"
        "from symbiosis.cli import main\n"
        "parent = os.getpid()\n"
        "def count():\n"
        "    print(os.getpid() == parent, flush=True)\n"
        "    return 0\n"
        "torch.cuda.device_count = count\n"
        "main.main()\n"
    )
    arguments = ["serve", str(model_folder), *address, "--supervise", "--device", "cuda"]
    counted = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True
    )
    assert "False" in counted.stdout
    assert "True" not in counted.stdout


def test_without_a_supervisor_patience_ends(model_folder: Path, tmp_path: Path) -> None:
    server = serve(model_folder, tmp_path)
    with connect(server.tcp, retry_s=1) as session:
        model = session.model()
        server.process.kill()
        finish(server.process)
        with pytest.raises(SymbiosisError, match="no executor answers"):
            model(torch.randint(3, 300, (1, 5)))


def test_a_supervisor_that_rests_hears_at_once() -> None:
    """After false starts it rests for seconds, and a sleep goes on after a signal."""
    code = (
        "import os, signal, time\n"
        "from symbiosis.cli import supervisor\n"
        "supervisor._PAUSE_S = 5\n"
        "def work(ready, again):\n"
        "    print('up', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "raise SystemExit(supervisor.Supervisor(work).run())\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    time.sleep(0.5)  # until the parent rests
    process.terminate()
    assert process.wait(5) == 0
    process.stdout.close()
