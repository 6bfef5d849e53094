"""`batch_lora`: peft's ``adapter_names`` by two products per layer, the same to rounding."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear
from transformers import PreTrainedModel, set_seed

from symbiosis import batch_lora

config = functools.partial(
    LoraConfig, r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False
)


def adapted(model: PreTrainedModel) -> PeftModel:
    """Adapters of two ranks and two scalings, one of them on other layers."""
    set_seed(0)
    tuned = get_peft_model(model, config(), adapter_name="first")
    tuned.add_adapter("second", config(r=2, lora_alpha=32))
    tuned.add_adapter("third", config(target_modules=["q_proj", "v_proj"]))
    return tuned.eval()


@torch.no_grad()
def logits(model: PeftModel, names: list[str], length: int = 5) -> torch.Tensor:
    set_seed(1)
    ids = torch.randint(0, 64, (len(names), length))
    found: torch.Tensor = model(input_ids=ids, adapter_names=names).logits
    return found


def both(model: PeftModel, names: list[str]) -> None:
    """The layers of ``model`` as they are, and as peft has them."""
    found = logits(model, names)
    batched = {type(layer) for layer in model.modules() if isinstance(layer, Linear)}
    for layer in model.modules():
        if isinstance(layer, Linear):
            layer.__class__ = Linear
    expected = logits(model, names)
    batch_lora(model)
    assert Linear not in batched
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "names",
    [
        ["first", "second", "third"],
        ["third", "first", "first", "third", "first"],
        ["__base__", "second", "__base__"],
        ["third"],  # no part in some layers
        ["__base__", "__base__"],
    ],
    ids="-".join,
)
def test_rows_have_the_numbers_of_their_adapters(
    twins: list[PreTrainedModel], names: list[str]
) -> None:
    for model in twins:
        both(batch_lora(adapted(model)), names)


def test_generation(twins: list[PreTrainedModel]) -> None:
    ids, names = torch.randint(0, 64, (3, 5)), ["second", "third", "first"]
    expected, found = (
        model.generate(input_ids=ids, adapter_names=names, max_new_tokens=8, do_sample=False)
        for model in (adapted(twins[0]), batch_lora(adapted(twins[1])))
    )
    assert torch.equal(found, expected)


Change = Callable[[PeftModel], object]


def a_step(model: PeftModel) -> None:
    model.set_adapter("second")
    model.train()
    ids = torch.randint(0, 64, (2, 5))
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0).step()
    model.eval()


def another_of_that_name(model: PeftModel) -> None:
    model.delete_adapter("second")
    model.add_adapter("second", config(r=3))
    model.eval()


def another_scaling(model: PeftModel) -> None:
    for layer in model.modules():
        if isinstance(layer, Linear):
            layer.set_scale("second", 3.0)


def a_copy(model: PeftModel) -> None:
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, Linear) and "second" in layer.lora_B:
                layer.lora_B["second"].weight.mul_(2)


def in_inference_mode(model: PeftModel) -> None:
    with torch.inference_mode():
        another_of_that_name(model)
        logits(model, ["first", "second", "third"])
        a_copy(model)


def hotswapped(model: PeftModel) -> None:
    for layer in model.modules():
        if isinstance(layer, Linear) and "second" in layer.lora_B:
            layer.lora_B["second"].weight.data.copy_(2 * layer.lora_B["second"].weight)
    batch_lora(model)


@pytest.mark.parametrize(
    "change",
    [a_step, another_of_that_name, another_scaling, a_copy, in_inference_mode, hotswapped],
)
def test_a_changed_adapter_is_seen(twins: list[PreTrainedModel], change: Change) -> None:
    model = batch_lora(adapted(twins[1]))
    names = ["first", "second", "third"]
    before = logits(model, names)
    change(model)
    assert not torch.allclose(logits(model, names)[1], before[1], atol=1e-3)
    assert torch.equal(logits(model, names)[0], before[0])
    both(model, names)


def test_a_model_that_is_moved_takes_its_adapters_along(twins: list[PreTrainedModel]) -> None:
    model = batch_lora(adapted(twins[1]))
    names = ["first", "second", "third"]
    logits(model, names)
    model.to(torch.bfloat16)
    logits(model, names)
    stacks = [m._kept for m in model.modules() if isinstance(m, Linear) and m._kept is not None]
    assert {stack.a.dtype for stack in stacks} == {torch.bfloat16}


def test_adapters_of_two_dtypes(twins: list[PreTrainedModel]) -> None:
    model = adapted(twins[1])
    for name, weight in model.named_parameters():
        if ".first." in name:
            weight.data = weight.data.bfloat16()
    names = ["first", "second", "third"]
    expected = logits(model, names)
    found = logits(batch_lora(model), names)
    torch.testing.assert_close(found[:1], expected[:1], rtol=0, atol=0.05)
    torch.testing.assert_close(found[1:], expected[1:], rtol=1e-5, atol=1e-5)


def test_what_is_no_plain_lora_is_left_to_peft(twins: list[PreTrainedModel]) -> None:
    plain, model = (adapted(model) for model in twins)
    for each in (plain, batch_lora(model)):
        set_seed(2)
        each.add_adapter("biased", config(lora_bias=True))
        each.eval()
    names = ["first", "biased"]
    assert torch.equal(logits(model, names), logits(plain, names))


def test_a_copy_is_its_own(local: PreTrainedModel) -> None:
    model = batch_lora(adapted(local))
    names = ["first", "second", "third"]
    before = logits(model, names)
    another = copy.deepcopy(model)
    a_copy(another)
    assert torch.equal(logits(model, names), before)
    both(another, names)


def test_rows_are_told_to_the_device_once(
    local: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU would make the host wait for it, layer by layer and token by token."""
    model, names = batch_lora(adapted(local)), ["first", "second", "first"]
    expected, made = logits(model, names), []
    tensor = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *a, **k: made.append(a) or tensor(*a, **k))
    assert torch.equal(logits(model, names), expected)
    assert [0, 1, 0] not in [arguments[0] for arguments in made]
    both(model, ["second", "first", "first"])
