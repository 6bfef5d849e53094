"""What a training run left behind, and whether two runs left the same."""

from __future__ import annotations

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import nn

Values = dict[str, torch.Tensor]


def adapter_of(model: nn.Module) -> Values:
    """The trained numbers of a PEFT model, those of its active adapter."""
    assert isinstance(model, PeftModel)
    state = get_peft_model_state_dict(model, adapter_name=model.active_adapter)
    return {name: value.detach().clone() for name, value in state.items()}


def assert_equal(found: Values, expected: Values) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys()
    assert expected
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def assert_close(found: Values, expected: Values, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    assert expected
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, msg=name)


def assert_trained(adapter: Values) -> None:
    """A LoRA whose B factors are no longer the zeros they began with."""
    factors = [value for name, value in adapter.items() if "lora_B" in name]
    assert factors
    assert all(value.any() for value in factors)
