"""The same code on the same base twice: once whole, in this process, and once in an executor.

The executor hosts model files, over a unix socket, once for all tests here. A test that reads
whole weights says so by the mark ``fetches``; every other one fails if a weight was fetched.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import tiny_files
from symbiosis import Executor, Session, connect


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fetches: this test reads whole weights")
    disable_progress_bar()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer, in files."""
    return tiny_files.build_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def hosted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an executor that hosts `folder`."""
    with Executor.load(str(folder)) as executor:
        yield executor.listen([f"unix://{tmp_path_factory.mktemp('run')}/base.sock"])[0]


@pytest.fixture
def session(hosted: str, request: pytest.FixtureRequest) -> Iterator[Session]:
    with connect(hosted) as opened:
        yield opened
        if request.node.get_closest_marker("fetches") is None:
            assert opened.stats().fetched_bytes == 0


@pytest.fixture
def twins(session: Session, folder: Path) -> list[PreTrainedModel]:
    """The whole local model, and the remote one."""
    return [AutoModelForCausalLM.from_pretrained(folder).eval(), session.model()]


@pytest.fixture
def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    loaded = PreTrainedTokenizerFast.from_pretrained(folder)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dogs", "ran", "in", "parks"]


def sentence(number: int) -> str:
    return " ".join(WORDS[(number * step) % len(WORDS)] for step in range(3, 7 + number % 5))


@pytest.fixture(scope="session")
def texts() -> Dataset:
    """Twenty short texts of different lengths."""
    return Dataset.from_list([{"text": sentence(number)} for number in range(20)])


@pytest.fixture
def tokenized(texts: Dataset, tokenizer: PreTrainedTokenizerFast) -> Dataset:
    return texts.map(lambda rows: tokenizer(rows["text"]), batched=True, remove_columns=["text"])


@pytest.fixture
def ids(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Two rows of six tokens, without padding."""
    rows = tokenizer([sentence(3) * 2, sentence(4) * 2])["input_ids"]
    return torch.tensor([row[:6] for row in rows])
