"""The base model of this project behind a recorder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import traffic
from attacks import Matcher
from recorder import Recorder
from torch import Tensor
from transformers import LlamaForCausalLM

from symbiosis import Executor


@pytest.fixture(scope="session")
def whole() -> LlamaForCausalLM:
    """The base as its operator has it."""
    return traffic.whole_model()


@pytest.fixture(scope="session")
def embeddings(whole: LlamaForCausalLM) -> Tensor:
    """(V, d)."""
    return whole.get_input_embeddings().weight.detach()


@pytest.fixture(scope="session")
def first_inputs(whole: LlamaForCausalLM, embeddings: Tensor) -> Tensor:
    """(V, d): what each token makes of the first layer's q, k and v input."""
    return whole.model.layers[0].input_layernorm(embeddings).detach()


@pytest.fixture(scope="session")
def matcher(whole: LlamaForCausalLM) -> Matcher:
    """Candidates at the input of layer 2; shared, for all seek behind the same prefixes."""
    return Matcher(whole, 2)


@pytest.fixture(scope="session")
def base_executor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the base is served, in fp32 and masked."""
    url = f"unix://{tmp_path_factory.mktemp('base')}/base.sock"
    with Executor.load(str(traffic.BASE), dtype=torch.float32, masked=(8, 16)) as executor:
        executor.listen([url])
        yield url


@pytest.fixture(scope="session")
def record(
    base_executor: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[traffic.Record]:
    """``record(windows=…, **options of connect)``: a client's work, seen by a recorder."""
    folder: Path = tmp_path_factory.mktemp("recorders")
    made: list[traffic.Traffic] = []

    def run(*, windows: int = traffic.WINDOWS, **options: object) -> traffic.Traffic:
        ids = traffic.text()[:windows]
        made.append(traffic.record(Recorder(folder, base_executor), ids, **options))
        return made[-1]

    yield run
    for one in made:
        one.session.close()
        one.recorder.close()


@pytest.fixture(scope="session")
def plain(record: traffic.Record) -> traffic.Traffic:
    """Traffic that nothing hides."""
    return record()


@pytest.fixture(scope="session")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorder]:
    """A recorder before a second executor with the same base: a helper, which multiplies masks."""
    folder = tmp_path_factory.mktemp("helper")
    with Executor.load(str(traffic.BASE), dtype=torch.float32, masked=(8,)) as executor:
        executor.listen([f"unix://{folder}/base.sock"])
        with Recorder(folder, f"unix://{folder}/base.sock") as recorder:
            yield recorder
