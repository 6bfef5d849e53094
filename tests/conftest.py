"""Shared by all tests: no network, one thread, tiny models, a real executor on a real socket."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
# Before torch, so that it holds for every thread: bits can depend on the number of threads.
os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Callable, Iterator
from pathlib import Path

# Processes that tests start find the tests' own modules.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH")))
)

import hypothesis
import pytest
import torch
from transformers import PreTrainedModel

import tiny
from symbiosis import Executor, Session, connect
from symbiosis.executor.weights import Weights

hypothesis.settings.register_profile(
    "suite",
    deadline=None,
    database=None,
    max_examples=150,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("suite")

Serve = Callable[..., tuple[Executor, str]]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny products gain nothing from more, and the machine may be small."""
    torch.set_num_threads(1)


@pytest.fixture(params=list(tiny.BUILDERS))
def architecture(request: pytest.FixtureRequest) -> str:
    """Each tiny architecture by name."""
    return str(request.param)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """``serve(model, tcp=False, **options)``: an executor and the URL where it listens."""
    started: list[Executor] = []

    def start(
        model: PreTrainedModel, *, tcp: bool = False, lend: bool = False, **options: object
    ) -> tuple[Executor, str]:
        executor = Executor(Weights(model, "tiny", lend=lend), **options)  # type: ignore[arg-type]
        started.append(executor)
        wanted = "tcp://127.0.0.1:0" if tcp else f"unix://{tmp_path}/base{len(started)}.sock"
        return executor, executor.listen([wanted])[0]

    yield start
    for executor in started:
        executor.close()


@pytest.fixture
def local() -> PreTrainedModel:
    """The model that `executor` hosts, whole, for comparison."""
    return tiny.llama()


@pytest.fixture
def executor(tmp_path: Path) -> Iterator[Executor]:
    """A tiny Llama, hosted and listening."""
    with Executor.of(tiny.llama()) as hosting:
        hosting.listen([f"unix://{tmp_path}/base.sock"])
        yield hosting


@pytest.fixture
def base_url(executor: Executor, tmp_path: Path) -> str:
    """Where `executor` listens."""
    return f"unix://{tmp_path}/base.sock"


@pytest.fixture
def session(base_url: str) -> Iterator[Session]:
    """A client's session with `executor`, over its socket."""
    with connect(base_url) as opened:
        yield opened
