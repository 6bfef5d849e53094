from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from symbiosis.errors import SymbiosisError
from symbiosis.jobs.spec import FinetuneSpec, GenerateSpec

FINETUNE: dict[str, Any] = {"base": "unix:///b", "data": Path("d"), "out": Path("o")}
GENERATE: dict[str, Any] = {"base": "unix:///b", "prompts": ("a",)}


def test_unknown_and_missing_fields_are_named() -> None:
    with pytest.raises(SymbiosisError, match=r"no field 'batchsize'; did you mean 'batch_size'\?"):
        FinetuneSpec.from_mapping({**FINETUNE, "batchsize": 3})
    with pytest.raises(SymbiosisError, match=r"no field 'xyzzy'$"):
        GenerateSpec.from_mapping({**GENERATE, "xyzzy": 3})
    with pytest.raises(SymbiosisError, match="'out'"):
        FinetuneSpec.from_mapping({"base": "unix:///b", "data": Path("d")})
    assert FinetuneSpec.from_mapping(FINETUNE) == FinetuneSpec(**FINETUNE)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch_size", 0),
        ("gradient_accumulation", 0),
        ("max_length", 0),
        ("log_steps", 0),
        ("steps", 0),
        ("eval_steps", 0),
        ("save_steps", -1),
        ("warmup_steps", -1),
        ("seed", -1),
        ("weight_decay", -0.1),
        ("epochs", 0),
        ("eval_fraction", 1),
        ("eval_fraction", -0.1),
        ("learning_rate", 0),
        ("scheduler", "wavy"),
        ("verify", 1.5),
        ("verify_weights", Path("model")),
    ],
)
def test_finetune_ranges(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        FinetuneSpec(**{**FINETUNE, field: value})


def test_masked_products_are_not_verified() -> None:
    with pytest.raises(ValueError, match="no check for masked products"):
        GenerateSpec(**GENERATE, verify=0.1, privacy="masked-local")


def test_resume_and_overwrite_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="resume and overwrite"):
        FinetuneSpec(**FINETUNE, resume=True, overwrite=True)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompts", ()),
        ("max_new_tokens", 0),
        ("temperature", 0),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("seed", -1),
    ],
)
def test_generate_ranges(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        GenerateSpec(**{**GENERATE, field: value})
