"""A training loop of one's own with `accelerate`, as its documentation writes it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import outcomes
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import set_seed
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    get_linear_schedule_with_warmup,
)

from symbiosis import Session


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """accelerate keeps its settings for the process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def loader(tokenized: Dataset, tokenizer: PreTrainedTokenizerFast) -> DataLoader:
    collator = DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm=False)
    return DataLoader(tokenized, shuffle=False, batch_size=4, collate_fn=collator)


def adapted(model: PreTrainedModel) -> PeftModel:
    set_seed(0)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))


def train(model: PeftModel, loader: DataLoader, accelerator: Accelerator) -> list[float]:
    optimizer = torch.optim.AdamW(params=model.parameters(), lr=1e-2)
    schedule = get_linear_schedule_with_warmup(optimizer, 1, 10)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    model.train()
    losses = []
    for batch in loader:
        with accelerator.accumulate(model):
            outputs = model(**batch)
            accelerator.backward(outputs.loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(accelerator.gather_for_metrics(outputs.loss.detach()).mean().item())
    return losses


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_loop(twins: list[PreTrainedModel], loader: DataLoader, accumulated: int) -> None:
    losses, adapters = [], []
    for model in twins:
        tuned = adapted(model)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulated)
        losses.append(train(tuned, loader, accelerator))
        adapters.append(outcomes.adapter_of(accelerator.unwrap_model(tuned)))
    outcomes.assert_equal(adapters[1], adapters[0])
    outcomes.assert_trained(adapters[1])
    assert losses[0] == losses[1]


def test_saving_the_adapter_and_loading_it_whole(
    twins: list[PreTrainedModel], loader: DataLoader, tmp_path: Path, ids: torch.Tensor
) -> None:
    local, remote = twins
    tuned = adapted(remote)
    accelerator = Accelerator(cpu=True)
    train(tuned, loader, accelerator)
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(tuned).save_pretrained(
        tmp_path, is_main_process=accelerator.is_main_process, save_function=accelerator.save
    )
    loaded = PeftModel.from_pretrained(local, tmp_path)
    tuned.eval()
    with torch.no_grad():
        assert torch.equal(tuned(ids).logits, loaded(ids).logits)


@pytest.mark.fetches
def test_saving_the_whole_state(
    twins: list[PreTrainedModel], session: Session, loader: DataLoader, tmp_path: Path
) -> None:
    """``save_state`` writes the base along with the adapter: one fetch of each weight."""
    saved = []
    for name, model in zip(("local", "remote"), twins, strict=True):
        tuned = adapted(model)
        accelerator = Accelerator(cpu=True)
        train(tuned, loader, accelerator)
        accelerator.save_state(str(tmp_path / name))
        saved.append(load_file(tmp_path / name / "model.safetensors"))
    outcomes.assert_equal(saved[1], saved[0])
    assert session.stats().fetched_bytes == session.welcome["bytes"]


def test_saving_the_state_without_the_base(
    twins: list[PreTrainedModel], loader: DataLoader, tmp_path: Path
) -> None:
    """As accelerate's guide to PEFT does it: a hook that saves the adapter alone."""
    tuned = adapted(twins[1])
    accelerator = Accelerator(cpu=True)
    train(tuned, loader, accelerator)

    def adapter_alone(models: list[PeftModel], weights: list[object], folder: str) -> None:
        for model in models:
            model.save_pretrained(folder)
            weights.pop()

    accelerator.register_save_state_pre_hook(adapter_alone)
    accelerator.save_state(str(tmp_path))
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert (tmp_path / "optimizer.bin").exists()
    assert not (tmp_path / "model.safetensors").exists()
