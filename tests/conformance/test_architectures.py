"""A spread of architectures, each split over a real socket against the same model run whole.

The full run over all of them is ``make conformance``; this one covers every operation kind.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from symbiosis import Executor
from symbiosis.wire.exchange import Op

from . import compare as comparing
from .catalogue import case, cases
from .compare import Record, compare, difference
from .report import BEGIN, END, section, write

SPREAD = [
    # decoders: linear layers, Conv1D, biases, tied weights, multi-query, parallel blocks
    "llama",
    "gpt2",
    "bloom",
    "opt",
    "falcon",
    "gemma3_text",
    "phi3",
    "gptj",
    # experts
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    "llama4_text",  # batched products
    "deepseek_v3",
    # state spaces, linear attention and hybrids
    "mamba",
    "mamba2",
    "jamba",
    "zamba",
    "qwen3_next",
    "rwkv",
    # encoder-decoders and encoders
    "t5",
    "bart/BartForConditionalGeneration",
    "whisper/WhisperForConditionalGeneration",
    "bert/BertForMaskedLM",
    "roberta/RobertaForMaskedLM",
    "modernbert",
    # pictures and sound
    "vit",
    "swin",
    "dinov2",
    "resnet",
    "convnext",
    "sam",
    "audio-spectrogram-transformer",
    "wav2vec2",
    # both
    "clip",
    "siglip",
    "llava",
    "qwen2_5_vl",
]

WHOLE_FAILS: set[tuple[str, str]] = {("llama4_text", "lora_gradient")}
"""Checks that transformers or peft do not do on the whole model either."""

_records: dict[str, Record] = {}


def test_the_spread_is_of_the_catalogue() -> None:
    assert len({case(name) for name in SPREAD}) == len(SPREAD) >= 25
    families = {case(name).family for name in SPREAD}
    assert families == {one.family for one in cases()}


@pytest.mark.parametrize("name", SPREAD)
def test_split_is_whole(name: str) -> None:
    """Outputs, gradients and generated tokens, bit for bit."""
    record = _records[name] = compare(case(name))
    assert not record.not_run
    for check, outcome in record.checks.items():
        if (name, check) in WHOLE_FAILS:
            assert outcome.verdict == "whole fails"
        else:
            assert outcome.verdict in ("exact", "not applicable"), (check, outcome)
    assert record.checks["forward"].verdict == "exact"
    assert 0 < record.grouped <= record.naive


def test_every_operation_is_exercised() -> None:
    """Runs after the spread; a new operation needs an architecture that uses it."""
    if set(_records) != set(SPREAD):
        pytest.skip("only part of the spread was run")
    used = {op for record in _records.values() for op in record.ops}
    masked = {Op.RING_LINEAR, Op.RING_MATMUL, Op.RING_MASK}  # tests/privacy
    assert used == {op.name for op in Op if op not in masked}


# That these comparisons can fail


def test_a_wrong_weight_in_the_executor_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    load = Executor.load

    def load_wrong(folder: str) -> Executor:
        executor = load(folder)
        next(w for w in executor.weights if "1.mlp.up_proj" in w.names[0]).tensor[3, 4] += 1e-3
        return executor

    monkeypatch.setattr(Executor, "load", load_wrong)
    checks = compare(case("llama")).checks
    for name in ("forward", "input_gradient", "lora_gradient"):
        assert checks[name].verdict == "differs", name
        assert 0 < checks[name].difference < 0.1


def test_a_wrong_norm_at_the_client_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = comparing.frozen

    def other(model: PreTrainedModel) -> PreTrainedModel:
        model.model.norm.weight.data[0] += 1e-3
        return frozen(model)

    monkeypatch.setattr(comparing, "frozen", other)
    assert compare(case("llama")).checks["forward"].verdict == "differs"


def test_differences() -> None:
    a, nan = torch.tensor([1.0, 2.0]), torch.tensor([float("nan"), 1.0])
    assert difference({"x": a}, {"x": a.clone()}).verdict == "exact"
    assert difference({"x": nan}, {"x": nan.clone()}).verdict == "exact"
    assert difference({"x": nan}, {"x": a}).verdict == "differs"
    assert difference({"x": a}, {"x": a + 1}).difference == 0.5
    assert difference({"x": a}, {"y": a}).verdict == "differs"
    assert difference({"x": a}, {"x": a.double()}).verdict == "differs"
    assert difference({"x": a.int()}, {"x": a.int() + 1}).verdict == "differs"


def test_the_section_replaces_only_itself(tmp_path: Path) -> None:
    document = tmp_path / "compatibility.md"
    document.write_text(f"# Compatibility\n\nA\n\n{BEGIN}\nold\n{END}\n\nB\n")
    write(document, [])
    assert document.read_text() == f"# Compatibility\n\nA\n\n{BEGIN}\n{section([])}{END}\n\nB\n"
