"""A base in eight or four bits: what is kept, what is computed with it, what clients see."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from torchao.quantization import Int8Tensor, PerRow, to_nf4
from transformers import PreTrainedModel, ResNetConfig, ResNetModel

import tiny
from exchanges import exchange, weight_id
from symbiosis import Executor, Session, connect
from symbiosis.errors import ModelError
from symbiosis.executor import ops, quantized
from symbiosis.executor.quantized import Scheme
from symbiosis.executor.weights import Weights
from symbiosis.wire.exchange import Op
from symbiosis.wire.views import View

SCHEMES: list[Scheme] = ["int8", "nf4"]
HALF_BYTE = {"int8": 1.0, "nf4": 0.5}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=SCHEMES)
def scheme(request: pytest.FixtureRequest) -> Scheme:
    return request.param  # type: ignore[no-any-return]


def matrix(rows: int = 96, columns: int = 128, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(rows, columns, generator=generator) * 0.02).to(dtype)


def dense(kept: quantized.QuantizedMatrix, like: torch.Tensor) -> torch.Tensor:
    return kept.unpack(torch.empty_like(like))


def wide(layers: int = 2) -> PreTrainedModel:
    """A Llama wide enough for the scales not to count."""
    return tiny.llama(
        hidden_size=128, intermediate_size=256, num_key_value_heads=4, num_hidden_layers=layers
    )


def hosting(model: PreTrainedModel, scheme: Scheme) -> Executor:
    return Executor(Weights(model, "tiny", quantize=scheme))


def twin_of(executor: Executor, model: PreTrainedModel) -> PreTrainedModel:
    """A whole local model with the numbers that the quantised weights stand for."""
    named = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for weight in executor.weights:
            named[weight.names[0]].copy_(weight.dense())
    return model


# One matrix


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(96, 128), (64, 32), (3 * 64, 64)], ids=str)
def test_the_numbers_are_those_of_the_library(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    w = matrix(*shape, dtype=dtype)
    int8 = quantized.quantize(w, "int8", 0)
    by_input = quantized.quantize(w, "int8", 1)
    nf4 = quantized.quantize(w, "nf4", 0)
    assert int8 is not None
    assert by_input is not None
    assert nf4 is not None
    assert torch.equal(dense(int8, w), Int8Tensor.from_hp(w, PerRow()).dequantize())
    assert torch.equal(dense(by_input, w), Int8Tensor.from_hp(w, PerRow(0)).dequantize())
    blocks = w.numel() // 64
    scales = max(size for size in range(1, 257) if blocks % size == 0)
    assert torch.equal(dense(nf4, w), to_nf4(w, 64, scales).get_original_weight())
    for kept in (int8, by_input, nf4):
        assert (dense(kept, w).dtype, dense(kept, w).shape) == (dtype, w.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_takes_a_byte_or_half_a_byte_for_a_number(scheme: Scheme, dtype: torch.dtype) -> None:
    w = matrix(512, 1024, dtype)
    kept = quantized.quantize(w, scheme, 0)
    assert kept is not None
    assert HALF_BYTE[scheme] <= kept.num_bytes / w.numel() < 1.05 * HALF_BYTE[scheme]


def test_errors_are_those_of_the_bits() -> None:
    w = matrix(512, 512)
    errors = {}
    for scheme in SCHEMES:
        kept = quantized.quantize(w, scheme, 0)
        assert kept is not None
        errors[scheme] = float((dense(kept, w) - w).norm() / w.norm())
    assert errors["int8"] < 0.01
    assert errors["nf4"] < 0.1


UNFIT = {
    "zeros": torch.zeros(64, 64),
    "not a number": torch.full((64, 64), float("nan")),
    "infinite": torch.full((64, 64), float("inf")),
    "double": matrix(dtype=torch.float64),
    "one number rules": torch.eye(64)[:1].mul(1e6) + matrix(64, 64),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_what_does_not_fit_is_not_quantised(scheme: Scheme, kind: str) -> None:
    """Or is, with a small error: never wrong numbers."""
    w = UNFIT[kind]
    kept = quantized.quantize(w, scheme, 0)
    if kept is not None:
        assert kind == "one number rules"
        assert (dense(kept, w) - w).norm() < 0.3 * w.norm()


def test_an_odd_size_stays_dense_in_four_bits() -> None:
    assert quantized.quantize(matrix(3, 33), "nf4", 0) is None
    assert quantized.quantize(matrix(3, 33), "int8", 0) is not None


# A model


def quantised_names(weights: Weights) -> set[str]:
    return {weight.names[0] for weight in weights if weight.quantized is not None}


def test_only_inner_linear_layers_are_quantised(scheme: Scheme, architecture: str) -> None:
    model = tiny.BUILDERS[architecture]()
    linear = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and name != "lm_head"
    }
    weights = Weights(tiny.BUILDERS[architecture](), "tiny", quantize=scheme)
    assert quantised_names(weights) == linear
    assert linear
    named = dict(model.named_parameters(remove_duplicate=False))
    for weight in weights:
        if weight.quantized is None:
            assert torch.equal(weight.dense(), named[weight.names[0]])
    assert weights.num_parameters == model.num_parameters()
    assert weights.dtype == torch.float32
    assert weights.device == torch.device("cpu")


def test_the_memory_is_that_of_the_bits(scheme: Scheme) -> None:
    dense = Weights(wide(layers=6), "tiny")
    model = wide(layers=6)
    few = Weights(model, "tiny", quantize=scheme)
    ends = sum(w.num_bytes for w in dense if len(w.names[0].split(".")) < 4)
    inner = dense.num_bytes - ends
    assert few.num_bytes - ends < 1.05 * inner * HALF_BYTE[scheme] / 4
    # And the model that was handed over has no dense copy left.
    assert sum(p.nbytes for n, p in model.named_parameters() if "proj" in n) == 0


VIEWS: dict[str, tuple[int, ...]] = {
    "whole": (),
    "rows": (View.SLICE, 4, 0, 8, 24, 1),
    "transposed": (View.TRANSPOSE, 2, 0, 1),
    "one row": (View.SELECT, 2, 0, 5, View.UNSQUEEZE, 1, 0),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("op", [Op.LINEAR, Op.MATMUL])
def test_products_are_those_with_the_dense_matrix(scheme: Scheme, op: Op, view: str) -> None:
    weights = Weights(wide(), "tiny", quantize=scheme)
    number = weight_id(weights, "layers.0.mlp.up_proj.weight")
    dense = weights[number].dense()
    seen = {
        "whole": dense,
        "rows": dense[8:24],
        "transposed": dense.t(),
        "one row": dense[5:6],
    }[view]
    x = torch.randn(5, seen.shape[1 if op is Op.LINEAR else 0])
    asked = exchange(op, number, x, recipe=VIEWS[view])
    plan = ops.check(asked, weights)
    (found,) = ops.run(asked, weights, (x,))
    assert torch.equal(found, x @ (seen.t() if op is Op.LINEAR else seen))
    assert plan.result_bytes == found.nbytes


def test_several_weights_in_one_exchange_do_not_get_mixed_up(scheme: Scheme) -> None:
    """They are unpacked into the same memory in turn."""
    weights = Weights(wide(), "tiny", quantize=scheme)
    ends = ("q_proj.weight", "v_proj.weight", "mlp.up_proj.weight")
    numbers = tuple(weight_id(weights, f"layers.1.{e}" if "mlp" in e else e) for e in ends)
    x = torch.randn(3, 128)
    found = ops.run(exchange(Op.LINEAR, numbers, x), weights, (x,))
    for number, result in zip(numbers, found, strict=True):
        assert torch.equal(result, x @ weights[number].dense().t())


# A client


@pytest.fixture
def remote(scheme: Scheme, tmp_path: Path) -> object:
    """A session with an executor of a quantised Llama, over its socket, and the local twin."""
    with hosting(wide(), scheme) as executor:
        url = executor.listen([f"unix://{tmp_path}/base.sock"])[0]
        with connect(url) as session:
            yield session, twin_of(executor, wide())


Remote = tuple[Session, PreTrainedModel]


def test_a_client_sees_an_ordinary_model(remote: Remote) -> None:
    session, local = remote
    model = session.model()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.num_parameters() == local.num_parameters()
    assert session.executor_stats()["quantization"] in SCHEMES
    assert session.welcome["bytes"] < local.get_memory_footprint() / 2


def test_logits_gradients_and_tokens_are_those_of_the_twin(remote: Remote) -> None:
    """Bit for bit: forward and backward use one and the same dense matrix."""
    session, local = remote
    ids = tiny.tokens()
    found: list[list[torch.Tensor]] = [[], []]
    for values, model in zip(found, (local, session.model()), strict=True):
        for _ in range(4):  # the first pass learns what goes together
            embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
            output = model(inputs_embeds=embedded, labels=ids)
            output.loss.backward()
            assert embedded.grad is not None
            assert embedded.grad.any()
            tokens = model.generate(ids, max_new_tokens=6, do_sample=False)
            with torch.no_grad():
                values += [output.logits, embedded.grad, tokens, model(ids).logits]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def test_chains_of_quantised_layers_are_exact(remote: Remote) -> None:
    """Decoding goes through many weights in one exchange once it has learned to."""
    session, local = remote
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    expected, found = (m.generate(tiny.tokens(1), **options) for m in (local, session.model()))
    assert torch.equal(found, expected)
    assert session.plan()


def test_the_answers_are_near_those_of_the_dense_base(remote: Remote, scheme: Scheme) -> None:
    session, _ = remote
    with torch.no_grad():
        found, dense = session.model()(tiny.tokens()).logits, wide()(tiny.tokens()).logits
    error = float((found - dense).norm() / dense.norm())
    assert 0 < error < (0.02 if scheme == "int8" else 0.2)


def test_qlora_as_it_is_written_for_quantised_models(remote: Remote) -> None:
    """The steps of peft's guide; the adapter is that of the twin bit for bit, and learns."""
    session, local = remote
    adapters, losses = [], []
    for base in (local, session.model()):
        torch.manual_seed(0)
        model = prepare_model_for_kbit_training(base)
        config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(6):
            optimizer.zero_grad()
            loss = model(input_ids=tiny.tokens(), labels=tiny.tokens()).loss
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
        adapters.append({n: p for n, p in model.named_parameters() if p.requires_grad})
    assert losses[:6] == losses[6:]
    assert losses[5] < 0.8 * losses[0]
    for name, value in adapters[0].items():
        assert torch.equal(adapters[1][name], value), name
    assert session.stats().fetched_bytes == 0


def test_a_fetched_weight_is_dense(remote: Remote) -> None:
    session, local = remote
    weight = session.model().model.layers[0].self_attn.q_proj.weight
    fetched = weight.fetch("a test")
    assert fetched.dtype == torch.float32
    assert torch.equal(fetched, local.model.layers[0].self_attn.q_proj.weight)


@pytest.mark.parametrize("architecture", ["gpt2", "mixtral", "llama-biases", "llama-tied"])
def test_other_architectures(scheme: Scheme, architecture: str) -> None:
    """Biases, Conv1D, tied embeddings, experts: loss and gradient are those of the twin."""
    with (
        hosting(tiny.BUILDERS[architecture](), scheme) as executor,
        connect(executor) as session,
    ):
        local = twin_of(executor, tiny.BUILDERS[architecture]())
        found = []
        for model in (local, session.model()):
            embedded = model.get_input_embeddings()(tiny.tokens()).detach().requires_grad_()
            output = model(inputs_embeds=embedded, labels=tiny.tokens())
            output.loss.backward()
            found.append((output.loss.detach(), embedded.grad))
        assert torch.equal(found[1][0], found[0][0])
        assert torch.equal(found[1][1], found[0][1])


def test_a_bfloat16_base(scheme: Scheme) -> None:
    with (
        hosting(wide().to(torch.bfloat16), scheme) as executor,
        connect(executor) as session,
        torch.no_grad(),
    ):
        local = twin_of(executor, wide().to(torch.bfloat16))
        model = session.model()
        assert model.dtype == torch.bfloat16
        assert torch.equal(model(tiny.tokens()).logits, local(tiny.tokens()).logits)


# Files


def test_loading(scheme: Scheme, tmp_path: Path) -> None:
    wide().save_pretrained(tmp_path)
    with Executor.load(str(tmp_path), quantize=scheme) as executor:
        assert executor.describe()["quantization"] == scheme
        assert len(quantised_names(executor.weights)) == 14
        assert isinstance(executor.describe()["bytes"], int)


def test_a_model_without_linear_layers_is_refused() -> None:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    with pytest.raises(ModelError, match="no linear layer"):
        Weights(ResNetModel(config), "tiny", quantize="int8")


def test_an_unknown_scheme(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no quantisation 'int3'; use int8 or nf4"):
        Executor.load(str(tmp_path), quantize="int3")  # type: ignore[arg-type]


def test_files_that_are_quantised_already_are_refused(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"quantised already \(bitsandbytes\).*--quantize int8"):
        Executor.load(str(tmp_path))


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ModelError, match="pip install -U torchao"):
        Weights(tiny.llama(), "tiny", quantize="int8")


def test_a_linear_layer_that_does_not_fit_stays_dense_and_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = tiny.llama()
    with torch.no_grad():
        nn.init.zeros_(model.model.layers[1].mlp.up_proj.weight)
    weights = Weights(model, "tiny", quantize="nf4")
    assert "model.layers.1.mlp.up_proj.weight" not in quantised_names(weights)
    assert "model.layers.1.mlp.up_proj.weight stays dense" in caplog.text


@pytest.mark.parametrize("lend", [False, True])
def test_the_dense_model_is_moved_weight_by_weight(
    scheme: Scheme, lend: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU need not have room for all of it."""
    wide().save_pretrained(tmp_path)
    monkeypatch.setattr(PreTrainedModel, "to", None)
    weights = Weights.load(str(tmp_path), quantize=scheme, lend=lend)
    assert any(weight.quantized is not None for weight in weights)


def test_on_a_gpu_it_is_not_lent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Which is said before anything is loaded."""
    with pytest.raises(ModelError, match="leave out --lend or --quantize"):
        Weights.load(str(tmp_path), device="meta", quantize="int8", lend=True)
