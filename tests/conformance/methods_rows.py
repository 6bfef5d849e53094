"""One row for each PEFT method: its configuration, and how peft's documentation applies it.

What a row is; the rows themselves are in `methods_lora` and `methods_others`. Knows peft; knows
nothing of executors.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftModel, PeftType, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

import tiny
from conformance.methods_models import Subject

Options = Mapping[str, Any]
Apply = Callable[[PreTrainedModel, PeftConfig, Subject, Path], PeftModel]
Extra = Callable[[Tensor], dict[str, Any]]


def plainly(
    model: PreTrainedModel, config: PeftConfig, subject: Subject, experts: Path
) -> PeftModel:
    return get_peft_model(model, config)


def as_it_is(model: PreTrainedModel, config: PeftConfig) -> None:
    pass


def _nothing(ids: Tensor) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Row:
    """A method as a user applies it."""

    name: str
    peft_type: str
    options: Callable[[Subject], Options]
    apply: Apply = plainly
    """(model, config, subject, a folder with two trained LoRA adapters) → the adapted model."""
    before_loading: Callable[[PreTrainedModel, PeftConfig], None] = as_it_is
    """What peft wants done to a fresh model before the saved adapter is loaded."""
    extra: Extra = _nothing
    """Further arguments of the forward pass, such as a task number."""
    trains: bool = True
    """Has it weights to train? Arrow has none: it routes between adapters trained already."""
    needs: str = ""
    """A package that peft imports for it and does not itself depend on."""
    note: str = ""
    covers: frozenset[str] = field(default_factory=frozenset)
    """Fields of its configuration that this row is there for."""

    @property
    def installed(self) -> bool:
        return not self.needs or importlib.util.find_spec(self.needs) is not None

    def config(self, subject: Subject) -> PeftConfig:
        kind = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(self.peft_type)]
        known = {f.name for f in dataclasses.fields(kind)}
        options = {"task_type": "CAUSAL_LM", **self.options(subject)}
        if subject.conv1d and "fan_in_fan_out" in known:
            options.setdefault("fan_in_fan_out", True)
        return kind(**options)


def batch(seed: int) -> Tensor:
    return tiny.tokens(rows=2, length=9, seed=seed)


def on_targets(**options: Any) -> Callable[[Subject], Options]:
    return lambda subject: {"target_modules": list(subject.targets), **options}


def on_square(**options: Any) -> Callable[[Subject], Options]:
    return lambda subject: {"target_modules": list(subject.square), **options}


def calibrate(model: torch.nn.Module) -> None:
    """What data-driven initialisations run: the model on a few batches, without a gradient."""
    with torch.no_grad():
        for seed in range(100, 108):
            model(input_ids=batch(seed)[:1])  # CorDA takes one sequence at a time
