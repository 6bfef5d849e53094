"""Several adapters of the peft library on one model, as its documentation uses them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from transformers import PreTrainedModel, set_seed

from symbiosis import Session


def lora(rank: int) -> LoraConfig:
    """An adapter that changes what the model says from the start."""
    return LoraConfig(
        r=rank, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False
    )


def with_three(model: PreTrainedModel) -> PeftModel:
    set_seed(0)
    tuned = get_peft_model(model, lora(4), adapter_name="first")
    tuned.add_adapter("second", lora(4))
    tuned.add_adapter("third", lora(2))
    return tuned.eval()


@torch.no_grad()
def logits(model: torch.nn.Module, ids: torch.Tensor, **options: object) -> torch.Tensor:
    found = model(input_ids=ids, **options).logits
    assert isinstance(found, torch.Tensor)
    return found


Use = Callable[[PeftModel, torch.Tensor], torch.Tensor]


def use_each(model: PeftModel, ids: torch.Tensor) -> torch.Tensor:
    found = []
    for name in ("first", "second", "third"):
        model.set_adapter(name)
        found.append(logits(model, ids))
    with model.disable_adapter():
        found.append(logits(model, ids))
    return torch.stack(found)


def use_in_one_batch(model: PeftModel, ids: torch.Tensor) -> torch.Tensor:
    four = torch.cat([ids, ids])
    return logits(model, four, adapter_names=["first", "__base__", "third", "second"])


def generate_in_one_batch(model: PeftModel, ids: torch.Tensor) -> torch.Tensor:
    return model.generate(
        input_ids=ids, adapter_names=["second", "third"], max_new_tokens=6, do_sample=False
    )


def use_combined(model: PeftModel, ids: torch.Tensor) -> torch.Tensor:
    model.add_weighted_adapter(["first", "second"], [0.7, 0.3], "linear", combination_type="linear")
    model.add_weighted_adapter(["first", "third"], [1.0, 0.5], "cat", combination_type="cat")
    model.add_weighted_adapter(
        ["first", "second"], [1.0, 1.0], "ties", combination_type="ties", density=0.5
    )
    model.add_weighted_adapter(["first", "second"], [0.5, 0.5], "svd", combination_type="svd")
    found = []
    for name in ("linear", "cat", "ties", "svd"):
        model.set_adapter(name)
        found.append(logits(model, ids))
    return torch.stack(found)


def use_two_together(model: PeftModel, ids: torch.Tensor) -> torch.Tensor:
    model.base_model.set_adapter(["first", "third"])
    return logits(model, ids)


def use_after_deleting(model: PeftModel, ids: torch.Tensor) -> torch.Tensor:
    model.delete_adapter("first")
    model.set_adapter("second")
    return logits(model, ids)


def use_unloaded(model: PeftModel, ids: torch.Tensor) -> torch.Tensor:
    return logits(model.unload(), ids)


WAYS: list[Use] = [
    use_each,
    use_in_one_batch,
    generate_in_one_batch,
    use_combined,
    use_two_together,
    use_after_deleting,
    use_unloaded,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_several_adapters(twins: list[PreTrainedModel], ids: torch.Tensor, way: Use) -> None:
    expected, found = (way(with_three(model), ids) for model in twins)
    assert torch.equal(found, expected)


def test_training_one_leaves_the_others(twins: list[PreTrainedModel], ids: torch.Tensor) -> None:
    grads = []
    for model in twins:
        tuned = with_three(model).train()
        tuned.set_adapter("second")
        tuned(input_ids=ids, labels=ids).loss.backward()
        grads.append({n: p.grad for n, p in tuned.named_parameters() if p.grad is not None})
    assert grads[1].keys() == grads[0].keys()
    assert all(".second." in name for name in grads[1])
    assert all(torch.equal(grads[1][name], grad) for name, grad in grads[0].items())


def test_loading_a_second_adapter_from_files(
    twins: list[PreTrainedModel], ids: torch.Tensor, tmp_path: Path
) -> None:
    local, remote = twins
    saved = with_three(local)
    saved.save_pretrained(str(tmp_path))
    model = PeftModel.from_pretrained(remote, tmp_path / "first", adapter_name="first")
    model.load_adapter(str(tmp_path / "third"), adapter_name="third")
    expected = use_each(saved, ids)
    for place, name in ((0, "first"), (2, "third")):
        model.set_adapter(name)
        assert torch.equal(logits(model, ids), expected[place])


def test_hot_swapping(twins: list[PreTrainedModel], ids: torch.Tensor, tmp_path: Path) -> None:
    from peft.utils.hotswap import hotswap_adapter

    found = []
    for model in twins:
        tuned = with_three(model)
        tuned.save_pretrained(str(tmp_path))
        tuned.set_adapter("first")
        hotswap_adapter(tuned, str(tmp_path / "second"), adapter_name="first")
        found.append(logits(tuned, ids))
    assert torch.equal(found[1], found[0])


def test_methods_mixed_on_one_model(twins: list[PreTrainedModel], ids: torch.Tensor) -> None:
    from peft import LoHaConfig, get_peft_model

    found = []
    for model in twins:
        set_seed(0)
        mixed = get_peft_model(model, lora(4), adapter_name="lora", mixed=True)
        assert isinstance(mixed, PeftMixedModel)
        loha = LoHaConfig(r=2, target_modules=["q_proj", "o_proj"], init_weights=False)
        mixed.add_adapter("loha", loha)
        mixed.set_adapter(["lora", "loha"])
        found.append(logits(mixed.eval(), ids))
    assert torch.equal(found[1], found[0])


@pytest.mark.fetches
def test_merging_some_of_them(
    twins: list[PreTrainedModel], session: Session, ids: torch.Tensor
) -> None:
    """Merging reads the adapted weights, once each, and makes them local; the rest stays."""
    found = []
    for model in twins:
        merged = with_three(model).merge_and_unload(adapter_names=["first", "third"])
        found.append(logits(merged, ids))
    assert torch.equal(found[1], found[0])
    adapted = 2 * 4 * (64 * 64 + 32 * 64 + 64 * 128)
    assert session.stats().fetched_bytes == adapted


@pytest.mark.fetches
def test_merging_for_a_while(twins: list[PreTrainedModel], ids: torch.Tensor) -> None:
    found = []
    for model in twins:
        tuned = with_three(model)
        tuned.set_adapter("second")
        tuned.merge_adapter()
        found.append(logits(tuned, ids))
        tuned.unmerge_adapter()
        found.append(logits(tuned, ids))
    assert torch.equal(found[2], found[0])
    assert torch.equal(found[3], found[1])


@pytest.mark.fetches
def test_a_merged_model_is_saved_whole(
    twins: list[PreTrainedModel], ids: torch.Tensor, tmp_path: Path
) -> None:
    """The base with every weight merged into is an ordinary model; saved, it needs no executor."""
    local, remote = twins
    set_seed(0)
    everything = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    merged = get_peft_model(remote, everything).merge_and_unload()
    for weight in (merged.get_input_embeddings().weight, merged.get_output_embeddings().weight):
        weight.requires_grad_(True).requires_grad_(False)
    merged.save_pretrained(tmp_path)
    loaded = type(local).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, ids), logits(merged, ids))
