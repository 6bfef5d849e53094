"""Many LoRA adapters in one client: all rows of a batch by two products per layer.

peft computes a batch whose rows have different adapters (``adapter_names=``) adapter by adapter.
Here they are stacked and multiplied at once, as Punica and S-LoRA do (arXiv 2310.18547 and
2311.03285). The numbers are peft's to rounding. Knows peft's layers; knows nothing of executors,
and does the same for a model that is whole.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from peft import PeftModel
from peft.tuners.lora.layer import VARIANT_KWARG_KEYS, Linear
from torch import Tensor

Model = TypeVar("Model", bound=PeftModel)


def batch_lora(model: Model) -> Model:
    """From now on ``adapter_names=`` costs one layer two products, and not two for each adapter.

    Changes ``model`` in place and returns it. Adapters may come and go afterwards; call it again
    after adding one to layers that had none. It is for inference: with gradients, or with dropout,
    peft computes, as it does for what is not plain LoRA on a linear layer (DoRA, aLoRA, biases,
    embeddings). Ranks may differ: shorter ones are filled up with zeros. A layer keeps the stack of
    its last batch's adapters, a second copy of them. What is changed through ``.data``, as peft's
    ``hotswap_adapter`` does it, torch does not notice: call this again to have it seen.
    """
    for layer in model.modules():
        if type(layer) is Linear:
            layer.__class__ = _BatchedLinear
        elif isinstance(layer, _BatchedLinear):
            layer._kept = None
    return model


class _Stack(NamedTuple):
    """The adapters of one batch."""

    adapters: tuple[str, ...]  # in the order in which the batch first names them
    weights: list[Tensor]  # A and B of each
    versions: list[object]
    scalings: list[float]
    a: Tensor  # (adapters, I, rank)
    b: Tensor  # (adapters, rank, O), times their scalings


class _BatchedLinear(Linear):  # type: ignore[misc]
    """peft's LoRA on a linear layer."""

    _kept: _Stack | None = None
    _rows: tuple[tuple[str, ...], Tensor] | None = None  # the last batch's names, and their numbers

    def _mixed_batch_forward(
        self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any
    ) -> Tensor:
        """``x`` (N, ..., I), an adapter for each of the N: (N, ..., O)."""
        adapters = tuple(dict.fromkeys(adapter_names))
        if not self._can_stack(adapters):
            mixed: Tensor = super()._mixed_batch_forward(
                x, *args, adapter_names=adapter_names, **kwargs
            )
            return mixed
        for key in VARIANT_KWARG_KEYS:
            kwargs.pop(key, None)
        result: Tensor = self.base_layer(x, *args, **kwargs)
        stack = self._stack(adapters)
        if stack is None:
            return result
        a, b = stack.a, stack.b
        if len(adapters) < len(adapter_names):
            rows = self._rows_of(tuple(adapter_names), adapters, a.device)
            a, b = a[rows], b[rows]
        inner = torch.bmm(x.reshape(len(x), -1, x.shape[-1]).to(a.dtype), a)
        if result.dtype is b.dtype:
            flat = result.reshape(len(x), -1, result.shape[-1])
            return torch.baddbmm(flat, inner, b).view(result.shape)
        return result + torch.bmm(inner, b).view(result.shape).to(result.dtype)

    def _rows_of(
        self, adapter_names: tuple[str, ...], adapters: tuple[str, ...], device: torch.device
    ) -> Tensor:
        """The number in the stack of each row's adapter. Kept: a GPU would wait for each copy."""
        kept = self._rows
        if kept is None or kept[0] != adapter_names or kept[1].device != device:
            numbers = [adapters.index(name) for name in adapter_names]
            kept = self._rows = adapter_names, torch.tensor(numbers, device=device)
        return kept[1]

    def _can_stack(self, adapters: Sequence[str]) -> bool:
        if torch.is_grad_enabled():
            return False
        dropouts = self.lora_dropout._modules
        return not any(
            name in self.lora_variant
            or self.lora_bias.get(name, False)
            or (self.training and not isinstance(dropouts.get(name), torch.nn.Identity | None))
            for name in adapters
        )

    def _stack(self, adapters: tuple[str, ...]) -> _Stack | None:
        """Of ``adapters``, of which those without a part in this layer add nothing; None if none
        has one."""
        weights, scalings = [], []
        for name in adapters:
            if (lora_a := self.lora_A._modules.get(name)) is not None:
                weights += [lora_a.weight, self.lora_B._modules[name].weight]
                scalings.append(float(self.scaling[name]))
        if not weights:
            return None
        versions = [_version(weight) for weight in weights]
        kept = self._kept
        if (
            kept is not None
            and kept.adapters == adapters
            and (kept.versions, kept.scalings) == (versions, scalings)
            and all(old is new for old, new in zip(kept.weights, weights, strict=True))
        ):
            return kept
        rank = max(weight.shape[0] for weight in weights[::2])
        wide, tall = weights[0].shape[1], weights[1].shape[0]
        dtype = functools.reduce(torch.promote_types, [weight.dtype for weight in weights])
        a = weights[0].new_zeros(len(adapters), wide, rank, dtype=dtype)
        b = weights[1].new_zeros(len(adapters), rank, tall, dtype=dtype)
        parts = zip(weights[::2], weights[1::2], scalings, strict=True)
        for number, name in enumerate(adapters):
            if name in self.lora_A._modules:
                lora_a, lora_b, scaling = next(parts)
                a[number, :, : len(lora_a)] = lora_a.t()
                b[number, : len(lora_a)] = scaling * lora_b.t()
        self._kept = _Stack(adapters, weights, versions, scalings, a, b)
        return self._kept


def _version(weight: Tensor) -> object:
    """Another one when the weight has changed or was moved. Of what was made in inference mode
    torch counts none: another one each time."""
    if weight.is_inference():
        return object()
    return weight._version, weight.data_ptr(), weight.dtype, weight.device
