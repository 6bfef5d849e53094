"""Gradient checkpointing: exchanges are made again in backward, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from transformers import PreTrainedModel, set_seed

import tiny
from symbiosis import Session

Gradients = dict[str, torch.Tensor]


def adapted(model: PreTrainedModel, **options: object) -> PeftModel:
    set_seed(0)
    config = LoraConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False, **options
    )
    return get_peft_model(model, config).train()


def gradients(model: PeftModel) -> Gradients:
    """Those of two micro-batches, added up."""
    set_seed(1)
    for seed in (1, 2):
        batch = tiny.tokens(seed=seed)
        (model(input_ids=batch, labels=batch).loss / 2).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_same(found: Gradients, expected: Gradients) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(gradient.any() for gradient in found.values())


def products_of(session: Session) -> int:
    """Frozen products of forward passes, first or repeated."""
    stats = session.stats()
    return stats.forward + stats.grouped


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("reentrant", [False, True])
def test_the_layers_of_a_model(
    twins: list[PreTrainedModel], session: Session, reentrant: bool, dropout: float
) -> None:
    """As with the local model, and as without checkpointing; each frozen product runs twice."""
    plain = gradients(adapted(session.model(), lora_dropout=dropout))
    products = products_of(session)
    found = []
    for model in twins:
        tuned = adapted(model, lora_dropout=dropout)
        tuned.gradient_checkpointing_enable({"use_reentrant": reentrant})
        tuned.enable_input_require_grads()
        found.append(gradients(tuned))
    assert_same(found[1], found[0])
    assert_same(found[1], plain)
    assert products_of(session) - products > 1.8 * products


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_block_that_the_user_chose(twins: list[PreTrainedModel], reentrant: bool) -> None:
    start = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    found = []
    for model in twins:
        x = start.clone().requires_grad_()
        checkpoint(model.model.layers[0].mlp, x, use_reentrant=reentrant).sin().sum().backward()
        found.append(x.grad)
    assert torch.equal(found[1], found[0])


def test_a_sequence_of_blocks(twins: list[PreTrainedModel]) -> None:
    start = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    found = []
    for model in twins:
        blocks = nn.Sequential(*[layer.mlp for layer in model.model.layers])
        x = start.clone().requires_grad_()
        checkpoint_sequential(blocks, 2, x, use_reentrant=False).sin().sum().backward()
        found.append(x.grad)
    assert torch.equal(found[1], found[0])


SAVING: dict[str, Callable[[], object]] = {
    "on the CPU": torch.autograd.graph.save_on_cpu,
    "packed": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: [t], lambda box: box[0]),
}


@pytest.mark.parametrize("where", SAVING)
def test_activations_saved_elsewhere(twins: list[PreTrainedModel], where: str) -> None:
    found = []
    for model in twins:
        with SAVING[where]():  # type: ignore[attr-defined]
            found.append(gradients(adapted(model)))
    assert_same(found[1], found[0])
