"""The published script rebuilds a hosted weight: what no executor can prevent."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

import tiny
from symbiosis import Executor, connect

SCRIPT = Path(__file__).parents[2] / "examples" / "rebuild_base.py"
Serve = Callable[..., tuple[Executor, str]]
NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rebuild_base", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_weight_that_may_not_be_fetched_is_rebuilt(
    serve: Serve, script: ModuleType, tmp_path: Path
) -> None:
    model = tiny.llama()
    truth = model.get_parameter(NAME).detach()
    _, url = serve(model, fetch="deny")
    out = tmp_path / "rebuilt.safetensors"
    with connect(url) as session:
        errors = script.rebuild(session, NAME, tiny.tokens(4, 48), out)
    assert torch.equal(load_file(out)[NAME], truth), "basis vectors give every bit"
    assert errors["64"] < 1e-3, "twice as many ordinary tokens as inputs"
    assert errors["128"] < 1e-4


def test_an_unknown_weight_is_named(serve: Serve, script: ModuleType) -> None:
    _, url = serve(tiny.llama())
    with connect(url) as session, pytest.raises(SystemExit, match=r"no matrix model\.nothing"):
        script.rebuild(session, "model.nothing", tiny.tokens(), None)
