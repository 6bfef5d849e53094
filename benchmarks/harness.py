"""What every benchmark needs: models on disk, processes, memory, medians.

A benchmark compares processes: one executor with its clients, and the same work as its users
would do it without us. Workers run one unit of work per command, so that A and B alternate on an
otherwise idle machine. Performance is measured here, never in a test.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple, Self

from symbiosis.cli.console import openmp

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "build" / "bench-models"
RESULTS = ROOT / "benchmarks" / "results"
WORKER = Path(__file__).with_name("worker.py")

LLAMA_110M = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
"""110 million parameters, 440 MB in fp32: the published GPT-2 small and TinyLlama in between."""

LLAMA_1B = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
"""1.03 billion parameters, 4.1 GB in fp32: the shape of TinyLlama."""

_START_S = 300
"""For an executor to be ready in."""

SIZES = {"110m": LLAMA_110M, "1b": LLAMA_1B}


def make_model(name: str, config: dict[str, Any], dtype: str = "float32") -> Path:
    """A Llama with random weights as an ordinary model folder; made once."""
    folder = MODELS / name
    if not folder.exists():
        code = (
            "import sys, json, torch; from transformers import LlamaConfig, LlamaForCausalLM\n"
            "config, folder, dtype = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]\n"
            "torch.manual_seed(0)\n"
            "model = LlamaForCausalLM(LlamaConfig(**config)).to(getattr(torch, dtype))\n"
            "model.save_pretrained(folder)"
        )
        MODELS.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=MODELS) as unfinished:  # it may be interrupted
            arguments = [json.dumps(config), f"{unfinished}/{name}", dtype]
            subprocess.run([sys.executable, "-c", code, *arguments], check=True)
            os.rename(f"{unfinished}/{name}", folder)
    return folder


class Chosen(NamedTuple):
    """The base that a benchmark was asked to use."""

    folder: Path
    title: str
    suffix: str  # of the file with the results
    serve: tuple[str, ...]  # options of the executor


def model_options(parser: argparse.ArgumentParser) -> None:
    """Options that `chosen_model` reads."""
    parser.add_argument("--model", default="110m", choices=list(SIZES))
    parser.add_argument(
        "--from-bf16",
        action="store_true",
        help="the files are in bf16, as most are; they are converted on loading",
    )
    parser.add_argument(
        "--lend", action="store_true", help="the executor lends its weights to the clients"
    )


def chosen_model(options: argparse.Namespace) -> Chosen:
    """Computed in fp32 in any case. From fp32 files plain transformers maps the file, so that
    processes on one machine share its pages; what is converted each process has for itself."""
    bf16 = "-bf16" if options.from_bf16 else ""
    folder = make_model(
        f"llama-{options.model}{bf16}",
        SIZES[options.model],
        "bfloat16" if options.from_bf16 else "float32",
    )
    title = f"Llama {options.model.upper()}, fp32{' from bf16 files' if options.from_bf16 else ''}"
    suffix = ("" if options.model == "110m" else f"-{options.model}") + bf16
    if options.lend:
        return Chosen(folder, f"{title}, lent", suffix + "-lent", ("--lend",))
    return Chosen(folder, title, suffix, ())


def environment(*, passive: bool, command: str | None = None) -> dict[str, str]:
    """The environment of a measured process. ``passive``: OpenMP threads sleep while they wait,
    which processes that share cores need; and as that `symbiosis` ``command`` arranges it."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "TOKENIZERS_PARALLELISM": "false"}
    env.pop("OMP_WAIT_POLICY", None)
    if passive:
        env["OMP_WAIT_POLICY"] = "passive"
    if passive and command is not None:
        env = {**openmp(command), **env}
    return env


def settle() -> None:
    """Until the executor has seen who is at work now: it looks once a second."""
    time.sleep(2.5)


class Process:
    """A process that runs units of work on command: JSON lines on its standard input, outcomes on
    its standard output."""

    def __init__(self, arguments: list[str], env: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
        self.pid = self._process.pid

    def ready(self) -> Self:
        """Wait until the model is loaded."""
        self._answer()
        return self

    def start(self, **command: Any) -> None:
        """Begin a unit of work without waiting for it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def finish(self) -> dict[str, Any]:
        """The outcome of the unit that was started."""
        return self._answer()

    def run(self, **command: Any) -> dict[str, Any]:
        """One unit of work, start to end."""
        self.start(**command)
        return self.finish()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"worker {self.pid} ended with code {self._process.wait()}")
        return json.loads(line)  # type: ignore[no-any-return]


class Worker(Process):
    """One that holds a model, whole or split."""

    def __init__(
        self,
        model: str,
        *,
        threads: int,
        passive: bool,
        seed: int = 0,
        trains: bool = False,
        privacy: dict[str, Any] | None = None,
    ) -> None:
        """``model``: a folder (the whole model in that process) or an executor's URL; with it the
        process is as `symbiosis finetune` if it ``trains``, else as `symbiosis generate`.
        ``privacy``: options of a `symbiosis.Privacy`."""
        arguments = [sys.executable, str(WORKER), model, str(threads), str(seed)]
        command = "finetune" if trains else "generate"
        env = environment(passive=passive, command=command if "://" in model else None)
        super().__init__([*arguments, json.dumps(privacy or {})], env)


@dataclass(frozen=True)
class Served:
    """A running executor."""

    unix: str
    tcp: str
    pid: int


@contextmanager
def executor(model: Path, *options: str) -> Iterator[Served]:
    """``symbiosis serve`` in a process of its own, on a UNIX and a TCP address."""
    with tempfile.TemporaryDirectory() as folder:
        unix = f"unix://{folder}/base.sock"
        log = Path(folder) / "log"
        with log.open("w") as sink:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "symbiosis.cli.main", "serve", str(model)),
                    *("--dtype", "float32"),
                    *("--listen", unix, "--listen", "tcp://127.0.0.1:0", *options),
                ],
                stdout=sink,
                stderr=sink,
                env=environment(passive=True, command="serve"),
            )
        try:
            yield Served(unix, _tcp_url(process, log), process.pid)
        finally:
            process.terminate()
            process.wait(30)


def _tcp_url(process: subprocess.Popen[bytes], log: Path) -> str:
    last_s = time.monotonic() + _START_S
    while process.poll() is None and time.monotonic() < last_s:
        text = log.read_text()
        if "ready" in text:
            return next(word for word in text.split() if word.startswith("tcp://127.0.0.1:"))
        time.sleep(0.1)
    raise RuntimeError(f"the executor did not start:\n{log.read_text()}")


def pss_bytes(pids: Sequence[int]) -> int:
    """Proportional set size over processes: shared pages are counted once in all."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


@contextmanager
def peak_pss(pids: Sequence[int]) -> Iterator[Callable[[], int]]:
    """Sample `pss_bytes` while the block runs; the yielded function returns the peak."""
    done, peak = threading.Event(), [pss_bytes(pids)]

    def sample() -> None:
        while not done.wait(0.25):
            peak[0] = max(peak[0], pss_bytes(pids))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield lambda: peak[0]
    finally:
        done.set()
        thread.join()


@dataclass(frozen=True)
class Sample:
    """Repeated measurements of one quantity."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> str:
        """The median with the interquartile range."""
        if len(self.values) < 4:
            return f"{self.median:.3g} [{min(self.values):.3g}–{max(self.values):.3g}]"
        low, _, high = statistics.quantiles(self.values, n=4)
        return f"{self.median:.3g} [{low:.3g}–{high:.3g}]"


def ratio(ours: Sample, theirs: Sample) -> Sample:
    """Pairwise ratios of alternated runs."""
    return Sample(tuple(a / b for a, b in zip(ours.values, theirs.values, strict=True)))


def save(name: str, result: dict[str, Any]) -> None:
    """Write a benchmark's figures with where and when they were measured."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    commit = _git("rev-parse", "--short", "HEAD")
    if _git("status", "--porcelain", "--", ".", ":!benchmarks/results"):
        commit += "-dirty"
    machine = f"{os.cpu_count()} cores, {platform.machine()}, {_cpu_model()}"
    where = {"commit": commit, "date": str(date.today()), "machine": machine}
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**where, **result}, indent=1, ensure_ascii=False) + "\n")
    print(f"→ {path.relative_to(ROOT)}")


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown CPU"


def _git(*args: str) -> str:
    return subprocess.run(
        ["git", *args], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
