"""Small configurations are small, keep a layer of each kind, and one architecture's crash is its
own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedConfig

from . import sweep as sweeping
from .catalogue import Case, case
from .compare import Record, tiny_model
from .rules import small
from .shrink import tiny_config
from .sweep import load, sweep


def shrunk(name: str) -> PreTrainedConfig:
    return tiny_config(case(name).model_class, case(name).model_type)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "vit", "mixtral", "deepseek_v3", "clip"])
def test_a_tiny_model_is_tiny(name: str) -> None:
    assert tiny_model(case(name)).num_parameters() < 1_000_000


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("gemma3_text", {"sliding_attention", "full_attention"}),
        ("qwen3_next", {"linear_attention", "full_attention"}),
    ],
)
def test_a_layer_of_each_kind_stays(name: str, kinds: set[str]) -> None:
    config = shrunk(name)
    assert set(config.layer_types) == kinds
    assert len(config.layer_types) == config.num_hidden_layers <= 4


def test_special_tokens_are_distinct_and_in_the_vocabulary() -> None:
    config = shrunk("qwen2_5_vl")
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = {getattr(config, name) for name in names}
    assert len(ids) == len(names)
    assert max(ids) < config.get_text_config().vocab_size
    assert min(ids) >= 100  # the text of the comparison stays below


def test_a_text_model_takes_the_text_part_of_a_larger_configuration() -> None:
    assert shrunk("qwen3_5").model_type == "qwen3_5_text"


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("num_hidden_layers", 32, 2),
        ("hidden_size", 4096, 64),
        ("num_key_value_heads", 1, 1),
        ("vocab_size", 50257, 128),
        ("use_cache", True, True),
        ("attention_dropout", 0.1, 0.1),
        ("conv_kernel", 4, 4),
    ],
)
def test_rules(field: str, value: Any, expected: Any) -> None:
    assert small(field, value) == expected


def test_a_hang_or_a_crash_ends_one_case_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def behave(one: Case) -> Record:
        if one.model_type == "gpt2":
            raise SystemExit(3)  # as a child that dies
        while one.model_type == "bloom":
            pass
        return Record(one.name, one.family)

    monkeypatch.setattr(sweeping, "compare", behave)
    chosen = [case(name) for name in ("gpt2", "bloom", "llama")]
    results = {r["name"]: r for r in sweep(chosen, tmp_path, jobs=2, limit_s=3.0)}
    assert "exit 3" in results[case("gpt2").name]["not_run"]
    assert "more than 3 s" in results[case("bloom").name]["not_run"]
    assert not results[case("llama").name]["not_run"]
    assert load(tmp_path, {case("llama").name}).keys() == {case("llama").name}
