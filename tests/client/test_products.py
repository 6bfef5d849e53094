"""Operations on remote weights against the same on the local ones: values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, PreTrainedModel

import tiny
from symbiosis import Executor, Session, connect
from symbiosis.client.remote_weight import RemoteWeight
from symbiosis.errors import UnsupportedOperation

Pair = tuple[PreTrainedModel, PreTrainedModel]


@pytest.fixture
def pair(session: Session, local: PreTrainedModel) -> Pair:
    """The remote model and its local twin."""
    return session.model(), local


def up(model: PreTrainedModel) -> nn.Linear:
    return model.model.layers[0].mlp.up_proj


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda x, w: F.linear(x, w),
    "linear 3d": lambda x, w: F.linear(x.view(2, 2, 32), w),
    "linear 1d": lambda x, w: F.linear(x[0], w),
    "linear with a bias": lambda x, w: F.linear(x, w, torch.arange(64.0)),
    "matmul": lambda x, w: x @ w.t(),
    "matmul 3d": lambda x, w: torch.matmul(x.view(2, 2, 32), w.transpose(0, 1)),
    "matmul 1d": lambda x, w: torch.matmul(x[0], w.t()),
    "mm": lambda x, w: torch.mm(x, w.t()),
    "mm by keyword": lambda x, w: torch.mm(x, mat2=w.t()) + x.mm(mat2=w.t()),
    "weight first": lambda x, w: w @ x.t(),
    "weight times vector": lambda x, w: w @ x[0],
    "addmm": lambda x, w: torch.addmm(torch.ones(64), x, w.t()),
    "addmm scaled": lambda x, w: torch.addmm(torch.ones(64), x, w.t(), beta=2, alpha=3),
    "einsum": lambda x, w: torch.einsum("ti,oi->to", x, w),
    "rows of the weight": lambda x, w: F.linear(x, w[8:16]),
    "columns of the weight": lambda x, w: F.linear(x[:, :16], w[:, :16]),
    "split weight": lambda x, w: torch.cat([F.linear(x, part) for part in w.split(16)], -1),
    "chunked weight": lambda x, w: F.linear(x, w.chunk(2)[1]),
    "reshaped weight": lambda x, w: x[:, :16] @ w.reshape(16, 128),
    "bmm": lambda x, w: torch.bmm(x.view(2, 2, 32), w.view(2, 32, 32)),
    "bmm weight first": lambda x, w: torch.bmm(w.view(2, 32, 32), x.view(2, 2, 32).transpose(1, 2)),
    "baddbmm": lambda x, w: torch.baddbmm(
        torch.ones(2, 2, 32), x.view(2, 2, 32), w.view(2, 32, 32), beta=0.5
    ),
    "expanded weight": lambda x, w: torch.matmul(
        x.view(2, 2, 32), w.t().unsqueeze(0).expand(2, 32, 64)
    ),
    "conv1d": lambda x, w: F.conv1d(x.t().unsqueeze(0), w.unsqueeze(-1)),
    "conv1d strided, with a bias": lambda x, w: F.conv1d(
        x.view(1, 16, 8), w.view(64, 16, 2), torch.ones(64), stride=2, padding=1
    ),
    "conv1d with valid padding": lambda x, w: F.conv1d(
        x.view(1, 16, 8), w.view(64, 16, 2), padding="valid"
    ),
    "conv2d, channels last": lambda x, w: F.conv2d(
        x.view(1, 4, 4, 8).permute(0, 3, 1, 2), w.view(64, 8, 2, 2), padding="valid"
    ),
    "depthwise, channels last": lambda x, w: F.conv2d(
        x.view(1, 4, 4, 8).permute(0, 3, 1, 2), w.view(-1)[:72].view(8, 1, 3, 3), groups=8
    ),
    "weight over a batch": lambda x, w: torch.matmul(w, x.view(2, 2, 32).transpose(1, 2)),
    "weights of two heads over a batch": lambda x, w: torch.matmul(
        w.view(2, 1, 32, 32), x.view(2, 2, 32).transpose(1, 2)
    ),
    "elementwise": lambda x, w: x * w[:4],
    "linear with a scaled weight": lambda x, w: F.linear(x, w * 0.5),
    "mm into given memory": lambda x, w: (
        x.sum() + torch.mm(x.detach(), w.t(), out=torch.empty(4, 64))
    ),
    "mm into a part of given memory": lambda x, w: (
        x.sum() + torch.mm(x.detach(), w[:8].t(), out=torch.zeros(8, 64)[:4, :8])
    ),
    "mm into memory that grows": lambda x, w: (
        x.sum() + torch.mm(x.detach(), w.t(), out=torch.empty(0))
    ),
    "addmm into given memory": lambda x, w: (
        x.sum() + torch.addmm(torch.ones(64), x.detach(), w.t(), out=torch.empty(4, 64))
    ),
    "addmm in place": lambda x, w: torch.ones(4, 64).addmm_(x, w.t(), beta=2),
    "adding in place": lambda x, w: x.clone().add_(w[:4]),
    "in place on the result": lambda x, w: F.linear(x, w).mul_(2).add_(1),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_values_and_gradients(pair: Pair, name: str) -> None:
    torch.manual_seed(0)
    start = torch.randn(4, 32)
    found = []
    for model in pair:
        x = start.clone().requires_grad_()
        y = OPERATIONS[name](x, up(model).weight.requires_grad_(False))
        (gradient,) = torch.autograd.grad(y.sin().sum(), x)
        found.append((y, gradient))
    (y, gradient), (local_y, local_gradient) = found
    assert type(y) is Tensor
    torch.testing.assert_close(y, local_y, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, local_gradient, rtol=1e-5, atol=1e-6)
    assert type(up(pair[0]).weight) is RemoteWeight


def test_what_does_not_fit_its_destination_is_refused_as_torch_does(pair: Pair) -> None:
    for model in pair:
        weight = up(model).weight.requires_grad_(False)
        with pytest.raises(RuntimeError, match=r"cannot|can't"):
            torch.ones(4, 64, dtype=torch.int64).add_(weight[:1, 0])
        with pytest.raises(RuntimeError, match="shape"):
            torch.ones(32).add_(weight)


def test_the_layout_of_a_convolution_is_kept(pair: Pair) -> None:
    """Torch has other kernels for channels last, and a dropout after it draws in that order."""
    x = torch.randn(2, 6, 6, 16).permute(0, 3, 1, 2)
    remote, local = (
        F.conv2d(x, up(model).weight.detach().reshape(-1)[:144].view(16, 1, 3, 3), groups=16)
        for model in pair
    )
    assert torch.equal(remote, local)
    assert remote.stride() == local.stride()


def test_double_backward(pair: Pair) -> None:
    """A gradient penalty: the gradient of a gradient's norm."""
    torch.manual_seed(0)
    start = torch.randn(3, 32)
    found = []
    for model in pair:
        x = start.clone().requires_grad_()
        y = F.linear(
            F.linear(x, up(model).weight.requires_grad_(False)).tanh().square(), torch.ones(1, 64)
        )
        (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        gradient.square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_gradcheck(session: Session) -> None:
    """The executor computes in float32, so the steps are large and the tolerance is wide."""
    layer = up(session.model(dtype=torch.float64))
    x = torch.randn(2, 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x, eps=1e-2, atol=1e-3)
    assert torch.autograd.gradgradcheck(
        lambda x: layer(x).square(), x, eps=1e-2, atol=1e-2, rtol=1e-2
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(pair: Pair, reentrant: bool) -> None:
    gradients = []
    for model in pair:
        model.train()
        model.requires_grad_(False)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        embedded = model.get_input_embeddings()(tiny.tokens()).detach().requires_grad_()
        model(inputs_embeds=embedded, labels=tiny.tokens()).loss.backward()
        gradients.append(embedded.grad)
    assert torch.equal(gradients[0], gradients[1])


def test_autocast_is_close(pair: Pair) -> None:
    outcomes = []
    for model in pair:
        with torch.autocast("cpu", torch.bfloat16):
            outcomes.append(model(tiny.tokens(), labels=tiny.tokens()))
    remote, local = outcomes
    assert remote.logits.dtype == local.logits.dtype == torch.bfloat16
    torch.testing.assert_close(remote.logits, local.logits, rtol=0.05, atol=0.02)
    torch.testing.assert_close(remote.loss, local.loss, rtol=0.01, atol=0.01)


def test_inference_mode(pair: Pair) -> None:
    remote, local = pair
    with torch.inference_mode():
        for _ in range(3):
            assert torch.equal(remote(tiny.tokens()).logits, local(tiny.tokens()).logits)


def test_inference_mode_notices_a_change_in_place(pair: Pair) -> None:
    attention, twin = (model.model.layers[0].self_attn for model in pair)
    with torch.inference_mode():
        for factor in (1.0, 1.0, 2.0):
            x = torch.randn(2, 32)
            attention.q_proj(x)
            x.mul_(factor)
            assert torch.equal(attention.k_proj(x), twin.k_proj(x))


def test_a_wrong_dtype_is_refused_as_torch_does(pair: Pair) -> None:
    for model in pair:
        with pytest.raises(RuntimeError, match="same dtype"):
            up(model)(torch.randn(2, 32, dtype=torch.float64))


def test_a_wrong_shape_is_refused(pair: Pair) -> None:
    with pytest.raises(Exception, match=r"up_proj|does not fit|shape"):
        up(pair[0])(torch.randn(2, 31))


def test_an_embedding_that_renormalises_is_refused(pair: Pair) -> None:
    weight = pair[0].get_input_embeddings().weight
    with pytest.raises(UnsupportedOperation, match="max_norm"):
        F.embedding(tiny.tokens(), weight, max_norm=1.0)


@pytest.mark.parametrize("ids", [[tiny.VOCABULARY], [-1]])
def test_a_token_id_out_of_range_is_an_error_that_names_it(pair: Pair, ids: list[int]) -> None:
    with pytest.raises(Exception, match=str(ids[0])):
        pair[0].get_input_embeddings()(torch.tensor(ids))


@pytest.mark.parametrize("transport", ["socket", "inproc"])
def test_results_may_be_changed_in_place(
    serve: Callable[..., tuple[Executor, str]], transport: str
) -> None:
    """As after any layer of one's own: GPT-2's products with a bias among them."""
    local = tiny.gpt2().requires_grad_(False)
    executor, url = serve(tiny.gpt2())
    with connect(url if transport == "socket" else executor) as session:
        found = []
        for model in (session.model(), local):
            block = model.transformer.h[0]
            x = torch.ones(2, 3, 32).requires_grad_()
            y = block.mlp.c_fc(x)
            y.mul_(2.0)
            y[0].add_(1.0)
            y = block.attn.c_attn(y[..., :32]).add_(1.0)
            y.sum().backward()
            found.append((y, x.grad))
    assert isinstance(local, GPT2LMHeadModel)
    torch.testing.assert_close(found[0], found[1])
