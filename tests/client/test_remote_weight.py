"""A remote weight as a tensor: what it claims to be, how it is copied, saved and made local."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import nn
from transformers import PreTrainedModel

import tiny
from symbiosis import Executor, Session, connect
from symbiosis.client.remote_weight import RemoteWeight
from symbiosis.errors import FetchRefused, UnsupportedOperation


@pytest.fixture
def model(session: Session) -> PreTrainedModel:
    return session.model()


@pytest.fixture
def weight(model: PreTrainedModel) -> RemoteWeight:
    found = model.model.layers[0].mlp.up_proj.weight
    assert type(found) is RemoteWeight
    return found


@pytest.fixture
def plain(local: PreTrainedModel) -> torch.Tensor:
    return local.model.layers[0].mlp.up_proj.weight.detach()


def remote_names(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if isinstance(p, RemoteWeight)}


def same(model: PreTrainedModel, local: PreTrainedModel) -> bool:
    with torch.no_grad():
        return torch.equal(model(tiny.tokens()).logits, local(tiny.tokens()).logits)


# What it claims to be


def test_it_is_a_frozen_parameter(weight: RemoteWeight, plain: torch.Tensor) -> None:
    assert isinstance(weight, nn.Parameter)
    assert (weight.shape, weight.dtype, weight.device) == (plain.shape, plain.dtype, plain.device)
    assert weight.stride() == plain.stride()
    assert not weight.requires_grad
    assert weight.is_leaf
    assert (weight.numel(), weight.dim(), weight.element_size()) == (64 * 32, 2, 4)


def test_a_module_is_what_it_was(model: PreTrainedModel, local: PreTrainedModel) -> None:
    for (name, module), (local_name, twin) in zip(
        model.named_modules(), local.named_modules(), strict=True
    ):
        assert (name, type(module)) == (local_name, type(twin))
    assert isinstance(model.lm_head, nn.Linear)
    assert model.num_parameters() == local.num_parameters()
    assert model.num_parameters(only_trainable=True) == 0
    assert str(model) == str(local)


def test_its_text_names_the_weight_and_the_executor(weight: RemoteWeight) -> None:
    for text in (repr(weight), str(weight)):
        assert "model.layers.0.mlp.up_proj.weight" in text
        assert "unix://" in text
        assert "(64, 32)" in text


def test_the_state_dict_has_the_local_keys(architecture: str) -> None:
    local = tiny.BUILDERS[architecture]()
    with Executor.of(tiny.BUILDERS[architecture]()) as executor, connect(executor) as session:
        state = session.model().state_dict()
    assert list(state) == list(local.state_dict())
    for name, value in local.state_dict().items():
        assert (state[name].shape, state[name].dtype) == (value.shape, value.dtype)


def test_tied_weights_stay_tied() -> None:
    with Executor.of(tiny.tied_llama()) as executor, connect(executor) as session:
        model = session.model()
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.num_parameters() == tiny.tied_llama().num_parameters()
        assert same(model, tiny.tied_llama())


# Moving and copying


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_is_lazy(
    session: Session, model: PreTrainedModel, local: PreTrainedModel, dtype: torch.dtype
) -> None:
    names = remote_names(model)
    model.to(dtype)
    assert remote_names(model) == names
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())
    assert session.stats().fetched_bytes == 0
    with torch.no_grad():
        found = model(tiny.tokens()).logits
        expected = local.to(dtype)(tiny.tokens()).logits
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype is torch.float64 else 0.05
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_there_and_back_is_exact(model: PreTrainedModel, local: PreTrainedModel) -> None:
    for name in remote_names(model):
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.half().float()
    assert same(model.to("cpu"), local)


def test_a_deep_copy_is_remote_and_works(
    architecture: str, serve: Callable[..., tuple[Executor, str]]
) -> None:
    local = tiny.BUILDERS[architecture]()
    _, url = serve(tiny.BUILDERS[architecture]())
    with connect(url) as session:
        model = session.model()
        twin = copy.deepcopy(model)
        assert remote_names(twin) == remote_names(model)
        assert all(isinstance(p, nn.Parameter) for p in twin.parameters())
        assert same(twin, local)
        assert same(model, local)
        if architecture == "llama-tied":
            assert twin.lm_head.weight is twin.model.embed_tokens.weight


def test_sharing_its_memory_shares_the_handle(model: PreTrainedModel, weight: RemoteWeight) -> None:
    """There is no memory: asking torch for it ended the process."""
    assert weight.share_memory_() is weight
    assert remote_names(model.share_memory()) == remote_names(model)


# Saving


@pytest.mark.parametrize("save", [pickle.dumps, lambda w: torch.save(w, io.BytesIO()), copy.copy])
def test_a_plain_pickle_says_what_to_do_instead(
    weight: RemoteWeight, save: Callable[[object], object]
) -> None:
    with pytest.raises(UnsupportedOperation, match=r"up_proj.*unix://.*adapter.*\.fetch"):
        save(weight)


def test_a_saved_state_dict_says_what_to_do_instead(model: PreTrainedModel) -> None:
    with pytest.raises(UnsupportedOperation, match="adapter"):
        torch.save(model.state_dict(), io.BytesIO())


SAVES: dict[str, Callable[[PreTrainedModel, Path], object]] = {
    "save_pretrained": lambda model, folder: model.save_pretrained(folder),
    "save_file": lambda model, folder: save_file(model.state_dict(), folder / FILE),
    "save_model": lambda model, folder: save_model(model, str(folder / FILE)),
}
FILE = "model.safetensors"


@pytest.mark.parametrize("how", SAVES)
def test_saving_the_whole_model_fetches_it(
    model: PreTrainedModel, local: PreTrainedModel, tmp_path: Path, how: str
) -> None:
    """And does not write empty tensors, which safetensors takes those without a storage for."""
    SAVES[how](model, tmp_path)
    saved = load_file(tmp_path / FILE)
    for name, parameter in local.named_parameters():
        assert torch.equal(saved[name], parameter), name


@pytest.mark.parametrize("how", SAVES)
def test_weights_that_may_not_leave_are_not_saved(
    serve: Callable[..., tuple[Executor, str]], tmp_path: Path, how: str
) -> None:
    _, url = serve(tiny.llama(), fetch="deny")
    with connect(url) as session, pytest.raises(FetchRefused, match="saving"):
        SAVES[how](session.model(), tmp_path)
    assert not (tmp_path / FILE).exists()


# Reading


READS: dict[str, Callable[[torch.Tensor], object]] = {
    "norm": lambda w: w.norm(dim=1),
    "sum": lambda w: w.sum(),
    "mean": lambda w: w.mean(0),
    "std": lambda w: w.std(),
    "max": lambda w: w.abs().max(),
    "item": lambda w: w[3, 4].item(),
    "row": lambda w: w[2] + 1,
    "svd": lambda w: torch.linalg.svd(w)[1],
    "cat": lambda w: torch.cat([w, w]),
    "product": lambda w: w * 2 - 1,
    "comparison": lambda w: w > 0,
    "transposed": lambda w: w.t() + 0,
    "sliced": lambda w: w[1:9:2, :5] * 1,
    "stack": lambda w: torch.stack([w, w]).sum(0),
}


@pytest.mark.parametrize("read", READS)
def test_reads_see_the_numbers(weight: RemoteWeight, plain: torch.Tensor, read: str) -> None:
    found, expected = READS[read](weight), READS[read](plain)
    assert type(found) is type(expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_like_functions_are_local(weight: RemoteWeight, plain: torch.Tensor) -> None:
    for make in (torch.zeros_like, torch.ones_like, torch.empty_like, torch.randn_like):
        made = make(weight)
        assert type(made) is torch.Tensor
        assert (made.shape, made.dtype) == (plain.shape, plain.dtype)
    assert weight.new_zeros(3).tolist() == [0, 0, 0]


def test_an_unknown_operation_is_refused_with_a_hint(weight: RemoteWeight) -> None:
    with pytest.raises(UnsupportedOperation, match=r"up_proj.*\.fetch\("):
        torch.fft.fft(weight)
    with pytest.raises(NotImplementedError):
        torch.cholesky_inverse(weight[:32])


def test_products_of_weights_read_them(weight: RemoteWeight, plain: torch.Tensor) -> None:
    for make in (
        lambda w: w.t() @ w,
        lambda w: torch.addmm(w, torch.ones(64, 1), torch.ones(1, 32)),
        lambda w: torch.baddbmm(w.view(2, 32, 32), torch.ones(2, 32, 1), torch.ones(2, 1, 32)),
    ):
        assert torch.equal(make(weight), make(plain))


def test_a_parametrization_comes_and_goes(
    model: PreTrainedModel, plain: torch.Tensor, weight: RemoteWeight
) -> None:
    """As peft puts LoRA on the tensor of all experts."""

    class Doubled(nn.Module):
        def forward(self, w: torch.Tensor) -> torch.Tensor:
            return 2 * w

    layer = model.model.layers[0].mlp.up_proj
    nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())
    assert torch.equal(layer.weight, 2 * plain)
    nn.utils.parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    assert type(layer.weight) is RemoteWeight
    assert torch.equal(layer(torch.eye(32)).t(), plain)


# Changing


def changed_in_place(weight: RemoteWeight, how: str) -> None:
    with torch.no_grad():
        match how:
            case "add_":
                weight.add_(1.0)
            case "copy_":
                weight.copy_(torch.zeros_like(weight))
            case "data.copy_":
                weight.data.copy_(torch.zeros_like(weight))
            case "zero_":
                weight.zero_()
            case "init":
                nn.init.normal_(weight)
            case "item":
                weight[0, 0] = 5.0
            case "+=":
                weight += 1.0
            case "diagonal":
                weight[:32].diagonal().zero_()


@pytest.mark.parametrize(
    "how", ["add_", "copy_", "data.copy_", "zero_", "init", "item", "+=", "diagonal"]
)
def test_a_change_happens_or_is_refused(
    model: PreTrainedModel, plain: torch.Tensor, how: str
) -> None:
    """Never a change that gets lost, or that only some uses of the weight see."""
    layer = model.model.layers[0].mlp.up_proj
    try:
        changed_in_place(layer.weight, how)
        refused = False
    except UnsupportedOperation:
        refused = True
    read, used = layer.weight + 0, layer(torch.eye(32)).t()
    assert refused or not torch.equal(read, plain), "the change got lost"
    torch.testing.assert_close(read, used, msg="what is read is not what is computed with")
    if refused:
        assert torch.equal(read, plain), "refused, and yet changed"


@pytest.mark.parametrize("how", ["copy_", "data.copy_", "diagonal", "+="])
def test_no_client_changes_the_base_of_the_others(
    executor: Executor, plain: torch.Tensor, how: str
) -> None:
    """In the executor's own process a fetched weight must not be the hosted one."""
    with connect(executor) as session:
        layer = session.model().model.layers[0].mlp.up_proj
        with contextlib.suppress(UnsupportedOperation):
            changed_in_place(layer.weight, how)
    hosted = next(w for w in executor.weights if w.names[0].endswith("0.mlp.up_proj.weight"))
    assert torch.equal(hosted.tensor, plain)


def test_loading_a_state_dict_changes_or_refuses(
    model: PreTrainedModel, plain: torch.Tensor
) -> None:
    layer = model.model.layers[0].mlp.up_proj
    try:
        layer.load_state_dict({"weight": torch.zeros(64, 32)})
    except (UnsupportedOperation, RuntimeError):
        assert torch.equal(layer.weight + 0, plain)
        return
    assert not (layer.weight + 0).any(), "load_state_dict() had no effect"


def test_data_assignment_makes_it_local(model: PreTrainedModel, plain: torch.Tensor) -> None:
    layer = model.model.layers[0].mlp.up_proj
    held = layer.weight
    held.data += 1.0
    assert layer.weight is held
    assert type(held) is nn.Parameter
    assert torch.equal(held, plain + 1.0)
    layer.weight.data = torch.zeros(64, 32)
    assert not layer(torch.randn(2, 32)).any()


def test_an_alias_sees_what_is_changed_through_it(
    model: PreTrainedModel, plain: torch.Tensor
) -> None:
    layer = model.model.layers[0].mlp.up_proj
    alias, other = layer.weight.data, layer.weight.data
    alias.mul_(0.5)
    alias.add_(1.0)
    other[0] = 7.0
    wanted = plain * 0.5 + 1.0
    wanted[0] = 7.0
    x = torch.randn(3, 64)
    for found in (alias, other, layer.weight.detach()):
        assert torch.equal(found, wanted)
        assert torch.equal(x @ found, x @ wanted)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.uint8])
def test_a_cast_to_another_kind_of_number_is_made(
    weight: RemoteWeight, plain: torch.Tensor, dtype: torch.dtype
) -> None:
    assert torch.equal(weight.to(dtype), plain.to(dtype))
    assert torch.equal((weight * 30).to(dtype), (plain * 30).to(dtype))
    assert torch.equal(weight.to(dtype).float(), plain.to(dtype).float())


def test_a_slice_in_another_dtype(weight: RemoteWeight, plain: torch.Tensor) -> None:
    found, wanted = weight[:, :10].to(torch.bfloat16), plain[:, :10].to(torch.bfloat16)
    assert found.stride() == wanted.stride()
    assert torch.equal(found.view(-1) + 0, wanted.view(-1))
    x = torch.randn(3, 10).bfloat16()
    torch.testing.assert_close(x @ found.t(), x @ wanted.t(), rtol=0.02, atol=1e-3)


def test_a_gradient_makes_it_local_and_trainable(
    model: PreTrainedModel, local: PreTrainedModel
) -> None:
    for one in (model, local):
        one.requires_grad_(False)
        one.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
        one.model.layers[1].mlp.down_proj.weight.requires_grad = True
        optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            one(tiny.tokens(), labels=tiny.tokens()).loss.backward()
            optimizer.step()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert list(trained) == [
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    ]
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter, local.get_parameter(name))
    assert len(remote_names(model)) == 14


def test_its_numbers_can_leave_torch(weight: RemoteWeight, plain: torch.Tensor) -> None:
    """As a NumPy array, the caller's own, or as a list; read once."""
    array = weight.cpu().numpy()
    assert (array == plain.numpy()).all()
    array[:] = 0
    assert weight.tolist() == plain.tolist()
    assert weight._session.stats().fetched_bytes == plain.nbytes
