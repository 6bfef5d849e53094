"""The models that every PEFT method is tried on, and what their parts are called.

Tiny, random, the same numbers at every call. Knows transformers; knows nothing of peft.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedModel

import tiny


@dataclass(frozen=True)
class Subject:
    """A model and the names of its parts, as `target_modules` takes them."""

    title: str
    build: Callable[[], PreTrainedModel]
    targets: tuple[str, ...]
    """Products that an adapter is put on."""
    square: tuple[str, ...]
    """Among them, those with as many features out as in."""
    bd: tuple[tuple[str, ...], tuple[str, ...]]
    """For block-diagonal LoRA: where A is in blocks, where B is."""
    parameters: tuple[str, ...]
    """Weights for ``target_parameters``: a mixture's experts where there are some."""
    embedding: str
    norm: str
    last_norm: str
    blocks: str
    conv1d: bool = False
    """Are its products `transformers.pytorch_utils.Conv1D`, with the weight stored (in, out)?"""


_LLAMA = {
    "targets": ("q_proj", "v_proj", "down_proj"),
    "square": ("q_proj", "o_proj"),
    "bd": (("down_proj",), ("q_proj", "v_proj")),
    "embedding": "embed_tokens",
    "norm": "input_layernorm",
    "last_norm": "norm",
    "blocks": "layers",
}

SUBJECTS: dict[str, Subject] = {
    "llama": Subject("Llama", tiny.llama, parameters=("q_proj.weight",), **_LLAMA),  # type: ignore[arg-type]
    "gpt2": Subject(
        "GPT-2",
        tiny.gpt2,
        targets=("c_attn", "c_fc", "mlp.c_proj"),
        square=("attn.c_proj",),
        bd=(("mlp.c_proj",), ("c_attn", "c_fc")),
        parameters=("c_attn.weight",),
        embedding="wte",
        norm="ln_1",
        last_norm="ln_f",
        blocks="h",
        conv1d=True,
    ),
    "mixtral": Subject(
        "Mixtral",
        tiny.mixtral,
        **{  # type: ignore[arg-type]
            **_LLAMA,
            "targets": ("q_proj", "v_proj", "o_proj"),
            "bd": (("o_proj",), ("q_proj", "v_proj")),
            "parameters": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
        },
    ),
}
