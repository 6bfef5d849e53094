"""Copies of a remote weight, parameters made of it, and its memory: what peft does with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

import tiny
from symbiosis import Executor, Session, connect
from symbiosis.client.remote_weight import RemoteWeight
from symbiosis.errors import FetchRefused, UnsupportedOperation

Serve = Callable[..., tuple[Executor, str]]


@pytest.fixture
def model(session: Session) -> PreTrainedModel:
    return session.model()


def weight_of(model: PreTrainedModel) -> torch.Tensor:
    return model.model.layers[0].self_attn.v_proj.weight


def test_a_copy_can_be_changed_and_the_weight_is_not(
    model: PreTrainedModel, local: PreTrainedModel
) -> None:
    delta = torch.full((16, 32), 0.5, requires_grad=True)
    copied = weight_of(model).clone()
    assert type(copied) is RemoteWeight
    copied += delta
    assert type(copied) is torch.Tensor
    assert torch.equal(copied, weight_of(local) + 0.5)
    copied.sum().backward()
    assert torch.equal(delta.grad, torch.ones(16, 32))
    assert type(weight_of(model)) is RemoteWeight
    assert torch.equal(weight_of(model).fetch("a test"), weight_of(local))


def test_a_copy_that_another_handle_looks_at_is_not_changed(model: PreTrainedModel) -> None:
    """The other handle would go on showing the old numbers."""
    copied = weight_of(model).clone()
    view = copied.t()
    with pytest.raises(UnsupportedOperation, match=r"clone\(\)"):
        copied += 1
    assert view.shape == (32, 16)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_parameter_made_of_a_weight_is_local(
    model: PreTrainedModel, local: PreTrainedModel, transposed: bool
) -> None:
    made, expected = (
        nn.Parameter(weight_of(m).T if transposed else weight_of(m)) for m in (model, local)
    )
    assert type(made) is nn.Parameter
    assert made.requires_grad
    assert torch.equal(made, expected)
    assert type(weight_of(model)) is RemoteWeight


def test_a_frozen_parameter_made_of_a_weight_is_remote(model: PreTrainedModel) -> None:
    made = nn.Parameter(weight_of(model).T, requires_grad=False)
    assert type(made) is RemoteWeight
    assert isinstance(made, nn.Parameter)


def test_a_parametrization_without_inverse(model: PreTrainedModel, local: PreTrainedModel) -> None:
    class Shifted(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight + 0.25

    ids = tiny.tokens()
    logits = []
    for m in (model, local):
        parametrize.register_parametrization(
            m.model.layers[0].self_attn.v_proj, "weight", Shifted()
        )
        with torch.no_grad():
            logits.append(m(ids).logits)
    assert torch.equal(*logits)


def test_a_product_added_to_a_weight_reads_it(
    model: PreTrainedModel, local: PreTrainedModel
) -> None:
    a, b = torch.randn(16, 3), torch.randn(3, 32)
    found, expected = (torch.addmm(weight_of(m), a, b) for m in (model, local))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("flipped", [False, True])
def test_a_weight_on_the_left_multiplies_as_it_does_here(
    model: PreTrainedModel, local: PreTrainedModel, flipped: bool
) -> None:
    """Bit for bit, whichever way the other operand lies in memory."""
    x = torch.randn(5, 32).t() if flipped else torch.randn(32, 5)
    found, expected = (weight_of(m) @ x for m in (model, local))
    assert torch.equal(found, expected)
    blocks = torch.randn(4, 8, 8).transpose(1, 2) if flipped else torch.randn(4, 8, 8)
    found, expected = (torch.bmm(weight_of(m).reshape(4, 16, 8), blocks) for m in (model, local))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "read",
    [
        lambda w: torch.linalg.solve(torch.eye(32) + 0.1, w.T),
        lambda w: torch.linalg.eigh(w[:, :16])[0],
        lambda w: w[:, :16].inverse(),
        lambda w: w.median(),
        lambda w: w.flatten().kthvalue(7)[0],
        lambda w: w[w.abs() > 0.01],
    ],
)
def test_decompositions_and_selections_read_it(
    model: PreTrainedModel,
    local: PreTrainedModel,
    read: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Not refused: peft takes a failing solver for a singular matrix and goes another way."""
    assert torch.equal(read(weight_of(model)), read(weight_of(local)))


def test_safetensors_saves_a_weight(
    model: PreTrainedModel, local: PreTrainedModel, tmp_path: Path
) -> None:
    weight = weight_of(model).detach()
    twice = {"one": weight, "same": weight.clone(), "cast": weight.to(torch.float64)}
    save_file(twice, tmp_path / "w.safetensors")
    found = load_file(tmp_path / "w.safetensors")
    assert torch.equal(found["one"], weight_of(local))
    assert torch.equal(found["same"], weight_of(local))
    assert torch.equal(found["cast"], weight_of(local).double())


def test_saving_a_weight_is_refused_where_weights_stay(serve: Serve, tmp_path: Path) -> None:
    _, url = serve(tiny.llama(), fetch="deny")
    with connect(url) as session:
        weight = weight_of(session.model())
        with pytest.raises(FetchRefused, match=r"saving it .*needs the whole of .*v_proj\.weight"):
            save_file({"w": weight.detach()}, tmp_path / "w.safetensors")
