"""What is hosted, what is shipped, what may be looked at, what cannot be loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save_file
from transformers import PreTrainedModel

import tiny
from exchanges import weight_id
from symbiosis.errors import InvalidInput, ModelError, ProtocolError, UnknownWeight
from symbiosis.executor.weights import Weights
from symbiosis.wire.tensors import ALIGNMENT
from symbiosis.wire.views import View


def hosted_names(weights: Weights) -> set[str]:
    return {name for weight in weights for name in weight.names}


def llama_products() -> set[str]:
    layer = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o")
    layer += ("mlp.gate", "mlp.up", "mlp.down")
    names = {f"model.layers.{n}.{name}_proj.weight" for n in (0, 1) for name in layer}
    return {"model.embed_tokens.weight", "lm_head.weight", *names}


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def test_every_tensor_is_hosted_or_shipped_and_none_is_both(architecture: str) -> None:
    model = tiny.BUILDERS[architecture]()
    weights = Weights(model, "tiny")
    hosted = hosted_names(weights)
    everything = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    everything |= {name for name, _ in model.named_buffers()}
    assert hosted | weights.shipped.keys() >= everything
    assert not hosted & weights.shipped.keys()


def test_numbers_are_those_of_the_model(architecture: str) -> None:
    model = tiny.BUILDERS[architecture]()
    weights = Weights(model, "tiny")
    named = dict(model.named_parameters(remove_duplicate=False))
    for weight in weights:
        for name in weight.names:
            assert torch.equal(weight.tensor, named[name])
        assert weight.tensor.data_ptr() % ALIGNMENT == 0
        assert weight.tensor.is_contiguous()
    for name, value in load(weights.shipped_bytes()).items():
        assert torch.equal(
            value, model.get_parameter(name) if name in named else weights.shipped[name]
        )


@pytest.mark.parametrize(
    ("architecture", "hosted", "shipped"),
    [
        (
            "llama",
            llama_products(),
            {"model.norm.weight", "model.layers.1.input_layernorm.weight"},
        ),
        ("gpt2", {"transformer.h.0.attn.c_attn.weight"}, {"transformer.h.0.attn.c_attn.bias"}),
        ("mixtral", {"model.layers.0.mlp.experts.gate_up_proj"}, {"model.norm.weight"}),
    ],
)
def test_products_are_hosted_and_small_parameters_shipped(
    architecture: str, hosted: set[str], shipped: set[str]
) -> None:
    weights = Weights(tiny.BUILDERS[architecture](), "tiny")
    assert hosted <= hosted_names(weights)
    assert shipped <= weights.shipped.keys()
    if architecture == "llama":
        assert hosted == hosted_names(weights)


def test_tied_weights_are_one_weight_with_two_names() -> None:
    weights = Weights(tiny.tied_llama(), "tiny")
    embedding = weights[weight_id(weights, "embed_tokens.weight")]
    assert set(embedding.names) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert len({weight.id for weight in weights}) == len(list(weights))


def test_unknown_weights_and_vectors_are_told() -> None:
    weights = Weights(tiny.llama(), "tiny")
    for number in (0, -1, 17, 2**32):
        with pytest.raises(UnknownWeight, match=f"weight {number} .*tiny"):
            weights[number]
        with pytest.raises(UnknownWeight):
            weights.view(number, (View.TRANSPOSE, 2, 0, 1))
    with pytest.raises(UnknownWeight):
        weights.vector(99)


def test_views_share_the_weights_memory() -> None:
    weights = Weights(tiny.llama(), "tiny")
    number = weight_id(weights, "0.mlp.up_proj.weight")
    tensor = weights[number].tensor
    recipe = (View.TRANSPOSE, 2, 0, 1, View.SLICE, 4, 1, 8, 16, 1)
    view = weights.view(number, recipe)
    assert torch.equal(view, tensor.t()[:, 8:16])
    assert view.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    assert weights.view(number, ()) is tensor


@pytest.mark.parametrize(
    "recipe",
    [
        (View.TRANSPOSE, 2, 0, 5),
        (View.SELECT, 2, 0, 1000),
        (View.SLICE, 4, 0, 0, 2, 0),
        (View.RESHAPE, 1, 7),
        (View.TRANSPOSE, 1, 0),
        (View.EXPAND, 2, 2**62, 2**62),
    ],
)
def test_recipes_that_do_not_fit_are_invalid_input(recipe: tuple[int, ...]) -> None:
    weights = Weights(tiny.llama(), "tiny")
    with pytest.raises(InvalidInput, match=r"lm_head|proj|embed"):
        weights.view(1, recipe)


@pytest.mark.parametrize("recipe", [(1,), (99, 0), (1, -1), (1, 9, 0)])
def test_malformed_recipes_are_protocol_errors(recipe: tuple[int, ...]) -> None:
    with pytest.raises(ProtocolError):
        Weights(tiny.llama(), "tiny").view(1, recipe)


def test_a_recipe_cannot_make_the_executor_copy_a_weight_many_times_over() -> None:
    """A copy of 128 MiB out of a weight of 12 KiB, for the price of a frame of 150 bytes."""
    weights = Weights(tiny.llama(), "tiny")
    rows, columns = weights[1].tensor.shape
    copies = (128 << 20) // (4 * rows * columns)
    recipe = (View.UNSQUEEZE, 1, 0, View.EXPAND, 3, copies, rows, columns, View.CONTIGUOUS, 0)
    with pytest.raises(InvalidInput):
        weights.view(1, recipe)


def test_a_folder_is_loaded_with_its_files(tmp_path: Path) -> None:
    model = tiny.llama()
    weights = Weights.load(str(saved(model, tmp_path)))
    assert weights.architecture == "LlamaForCausalLM"
    assert weights.dtype == torch.float32
    assert weights.num_parameters == model.num_parameters()
    assert weights.num_bytes == sum(4 * weight.tensor.numel() for weight in weights)
    named = dict(model.named_parameters())
    assert all(torch.equal(weight.tensor, named[weight.names[0]]) for weight in weights)
    assert set(weights.files) == {"config.json", "generation_config.json"}
    assert weights.files["config.json"] == (tmp_path / "config.json").read_bytes()


def test_another_dtype_can_be_asked_for(tmp_path: Path) -> None:
    weights = Weights.load(str(saved(tiny.llama(), tmp_path)), dtype=torch.bfloat16)
    assert {weight.tensor.dtype for weight in weights} == {torch.bfloat16}


def test_a_model_in_memory_comes_with_a_configuration() -> None:
    files = Weights(tiny.gpt2(), "tiny").files
    assert json.loads(files["config.json"])["model_type"] == "gpt2"


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("tokenizer.json", True),
        ("tokenizer_config.json", True),
        ("vocab.json", True),
        ("merges.txt", True),
        ("chat_template.jinja", True),
        ("model-2.safetensors", False),
        ("pytorch_model.bin", False),
        ("modeling_custom.py", False),
        ("tokenizer_custom.py", False),
        ("tokenizer.safetensors", False),
        ("vocab.bin", False),
        ("vocab.pkl", False),
        ("chat_template.py", False),
        ("secrets.env", False),
    ],
)
def test_files_are_configuration_and_tokenizer_never_weights_or_code(
    tmp_path: Path, name: str, wanted: bool
) -> None:
    saved(tiny.llama(), tmp_path)
    (tmp_path / name).write_bytes(b"{}")
    files = Weights(tiny.llama(), "tiny", tmp_path).files
    assert (name in files) is wanted
    assert "model.safetensors" not in files


# What cannot be hosted


def refused(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        Weights.load(str(folder))
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_a_missing_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nothing")


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    (saved(tiny.llama(), tmp_path) / "config.json").unlink()
    assert "config.json" in refused(tmp_path) or "model_type" in refused(tmp_path)


def test_a_configuration_that_is_no_json(tmp_path: Path) -> None:
    (saved(tiny.llama(), tmp_path) / "config.json").write_text("{")
    refused(tmp_path)


def test_an_unknown_kind_of_model(tmp_path: Path) -> None:
    (saved(tiny.llama(), tmp_path) / "config.json").write_text('{"model_type": "ours"}')
    assert "ours" in refused(tmp_path)


def test_an_architecture_that_is_no_model(tmp_path: Path) -> None:
    config = saved(tiny.llama(), tmp_path) / "config.json"
    text = config.read_text().replace("LlamaForCausalLM", "pipeline")
    config.write_text(text)
    refused(tmp_path)


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    (saved(tiny.llama(), tmp_path) / "model.safetensors").unlink()
    torch.save(tiny.llama().state_dict(), tmp_path / "pytorch_model.bin")
    assert "safetensors" in refused(tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    (saved(tiny.llama(), tmp_path) / "model.safetensors").unlink()
    refused(tmp_path)


def test_a_truncated_weights_file(tmp_path: Path) -> None:
    file = saved(tiny.llama(), tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    refused(tmp_path)


def test_weights_of_another_shape(tmp_path: Path) -> None:
    config = saved(tiny.llama(), tmp_path) / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 32', '"hidden_size": 64'))
    refused(tmp_path)


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    """transformers would initialise them at random, with no more than a warning."""
    file = saved(tiny.llama(), tmp_path) / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    assert "up_proj" in refused(tmp_path)
