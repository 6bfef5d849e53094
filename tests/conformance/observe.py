"""What is observed of a model, be it whole or split: outputs, gradients, generated tokens.

Each observation is a flat table of tensors; the same code runs for both models with the same
seeds. Knows no executor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from .inputs import Inputs

Table = dict[str, Tensor]

NEW_TOKENS = 6


def forward(model: nn.Module, inputs: Inputs) -> Table:
    """Every tensor of the output, without gradients."""
    _seed(5)
    with torch.no_grad():
        return dict(_tensors(model(**inputs)))


def input_gradient(model: PreTrainedModel, inputs: Inputs) -> Table:
    """The gradient with respect to what the embedding of the tokens gives and to every float
    input (pixels, sound)."""
    model.requires_grad_(False)
    _seed(5)
    leaves: list[Tensor] = []

    def start_here(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        leaves.append(leaf)
        return leaf.clone()

    hooks = [module.register_forward_hook(start_here) for module in _embeddings(model)]
    fed = dict(inputs)
    for name, value in inputs.items():
        if value.is_floating_point():
            leaves.append(value.clone().requires_grad_())
            fed[name] = leaves[-1]
    try:
        _loss(model(**fed)).backward()
    finally:
        for hook in hooks:
            hook.remove()
    gradients = {str(i): leaf.grad for i, leaf in enumerate(leaves) if leaf.grad is not None}
    return _not_empty(gradients, "no gradient reaches the inputs")


def lora_gradient(model: PreTrainedModel, inputs: Inputs) -> Table:
    """The gradients of LoRA on every linear layer, in training mode; changes ``model``."""
    _seed(3)
    adapted = get_peft_model(model, _lora(model))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    adapted.train()
    _seed(5)
    _loss(adapted(**inputs)).backward()
    gradients = {
        name: parameter.grad
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad and parameter.grad is not None
    }
    return _not_empty(gradients, "no gradient reaches the adapter")


def generated(model: PreTrainedModel, inputs: Inputs) -> Table:
    """The tokens of a greedy generation, `NEW_TOKENS` of them."""
    _seed(5)
    given = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    if "input_ids" in given and "attention_mask" not in given:
        given["attention_mask"] = torch.ones_like(given["input_ids"])
    how: dict[str, Any] = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
    if model.config.is_encoder_decoder and model.generation_config.decoder_start_token_id is None:
        how["decoder_start_token_id"] = 0
    with torch.no_grad():
        tokens = model.generate(**given, do_sample=False, **how)
    return dict(_tensors(tokens))


CHECKS: dict[str, Callable[[PreTrainedModel, Inputs], Table]] = {
    "forward": forward,
    "input_gradient": input_gradient,
    "generate": generated,
    "lora_gradient": lora_gradient,
}
"""In this order: the last one changes the model."""


def _seed(seed: int) -> None:
    """Some models draw masks with numpy."""
    torch.manual_seed(seed)
    np.random.seed(seed)


def _lora(model: PreTrainedModel) -> LoraConfig:
    """Every linear layer; without those that peft excludes in Mamba, which read their weight."""
    mamba = any(hasattr(module, "A_log") for module in model.modules())
    excluded = ["out_proj", "conv1d"] if mamba else None
    return LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", exclude_modules=excluded)


def _embeddings(model: PreTrainedModel) -> list[nn.Module]:
    """The token embeddings: encoder and decoder may each have one on the same weight."""
    try:
        found = model.get_input_embeddings()
    except NotImplementedError:
        return []
    several = list(found) if isinstance(found, nn.ModuleList) else [found]
    weights = {id(module.weight) for module in several if isinstance(module, nn.Embedding)}
    return [m for m in model.modules() if isinstance(m, nn.Embedding) and id(m.weight) in weights]


def _loss(output: Any) -> Tensor:
    """A scalar to which each number of the output contributes, with a weight of its own."""
    generator = torch.Generator().manual_seed(7)
    total = torch.zeros(())
    for _, tensor in _tensors(output):
        if tensor.requires_grad and (tensor.is_floating_point() or tensor.is_complex()):
            real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            noise = torch.randn(real.shape, generator=generator)
            total = total + (real.float() * noise).sum() / max(1, real.numel()) ** 0.5
    return total


def _tensors(value: Any, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if "past" not in str(key) and "cache" not in str(key):
                yield from _tensors(item, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _tensors(item, f"{name}.{i}")


def _not_empty(table: Table, why: str) -> Table:
    if not any(bool(value.any()) for value in table.values()):
        raise ValueError(why)
    return table
