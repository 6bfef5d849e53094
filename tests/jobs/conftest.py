"""An executor that hosts a tiny model with a tokenizer, once for all tests of jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

import tiny_files
from symbiosis import Executor

Host = Callable[[Path], str]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_files.build_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_files.build_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def train_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_files.write_training_data(tmp_path_factory.mktemp("data") / "train.jsonl")


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Host a model folder; the URL. All are closed at the end of the session."""
    executors: list[Executor] = []

    def start(folder: Path) -> str:
        executor = Executor.load(str(folder))
        executors.append(executor)
        return executor.listen([f"unix://{tmp_path_factory.mktemp('run')}/base.sock"])[0]

    yield start
    for executor in executors:
        executor.close()


@pytest.fixture(scope="session")
def base(host: Host, model_folder: Path) -> str:
    """The URL of an executor that hosts `model_folder`."""
    return host(model_folder)


@pytest.fixture(scope="session")
def wider_base(host: Host, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URL of one that hosts a wider model."""
    folder = tmp_path_factory.mktemp("models") / "wider-llama"
    return host(tiny_files.build_model(folder, layers=3, hidden=96))


@pytest.fixture(scope="session")
def shallow_base(host: Host, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URL of one that hosts the same architecture with fewer layers."""
    folder = tmp_path_factory.mktemp("models") / "shallow-llama"
    return host(tiny_files.build_model(folder, layers=1))
