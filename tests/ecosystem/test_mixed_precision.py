"""Mixed precision as torch, accelerate and the Trainer have it.

Where the executor's weights have the dtype of autocast, the bits are those of the local model.
Where it holds float32 weights they are not cast for a client's autocast: the product is taken with
the float32 weights and rounded once, which is closer to the float32 model than torch's is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import outcomes
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

import tiny
from symbiosis import Executor, connect

Serve = Callable[..., tuple[Executor, str]]
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """accelerate keeps its settings for the process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def half_twins(request: Any, folder: Path, serve: Serve) -> Iterator[list[PreTrainedModel]]:
    """The same base in bfloat16 or float16, local and remote."""
    models = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=request.param).eval() for _ in range(2)
    ]
    _, url = serve(models[1])
    with connect(url) as session:
        yield [models[0], session.model()]


def adapted(model: PreTrainedModel) -> PeftModel:
    set_seed(0)
    config = LoraConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False, lora_alpha=2
    )
    return get_peft_model(model, config).train()


def step(model: PeftModel, dtype: torch.dtype | None) -> outcomes.Values:
    """Loss, logits and gradients of one step, under autocast if a dtype is given."""
    batch = tiny.tokens()
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        output = model(input_ids=batch, labels=batch)
    output.loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": output.loss.detach(), "logits": output.logits.detach(), **found}


@pytest.mark.parametrize("half_twins", HALVES, indirect=True, ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_half_precision_base(half_twins: list[PreTrainedModel], autocast: bool) -> None:
    """peft's adapters are float32 on it."""
    dtype = half_twins[0].dtype
    found = [step(adapted(model), dtype if autocast else None) for model in half_twins]
    assert {p.dtype for p in half_twins[1].parameters() if p.requires_grad} == {torch.float32}
    outcomes.assert_equal(found[1], found[0])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast_over_a_float32_base(twins: list[PreTrainedModel], dtype: torch.dtype) -> None:
    local, remote = twins
    exact = step(adapted(AutoModelForCausalLM.from_pretrained(local.name_or_path)), None)
    expected, found = step(adapted(local), dtype), step(adapted(remote), dtype)
    errors = {}
    for name, value in exact.items():
        assert found[name].dtype == expected[name].dtype
        scale = value.float().abs().max()
        errors[name] = [
            float((v[name].float() - value.float()).abs().max() / scale) for v in (found, expected)
        ]
        assert errors[name][0] < 16 * torch.finfo(dtype).eps, name
    ours, theirs = (sum(error[place] for error in errors.values()) for place in (0, 1))
    assert ours < 1.1 * theirs


@pytest.mark.parametrize("half_twins", [torch.bfloat16], indirect=True, ids=str)
def test_the_trainer_in_bfloat16(
    half_twins: list[PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    tokenized: Dataset,
    tmp_path: Path,
) -> None:
    adapters = []
    for model in half_twins:
        trainer = Trainer(
            model=adapted(model),
            args=TrainingArguments(
                output_dir=str(tmp_path),
                bf16=True,
                max_steps=3,
                learning_rate=1e-3,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=tokenized,
            data_collator=DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm=False),
        )
        trainer.train()
        adapters.append(outcomes.adapter_of(trainer.model))
    outcomes.assert_equal(adapters[1], adapters[0])


@pytest.mark.parametrize("half_twins", [torch.bfloat16], indirect=True, ids=str)
def test_accelerate_in_bfloat16(half_twins: list[PreTrainedModel]) -> None:
    adapters = []
    for model in half_twins:
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        tuned = adapted(model)
        optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-3)
        tuned, optimizer = accelerator.prepare(tuned, optimizer)
        for seed in range(3):
            batch = tiny.tokens(seed=seed)
            loss = tuned(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        adapters.append(outcomes.adapter_of(accelerator.unwrap_model(tuned)))
    outcomes.assert_equal(adapters[1], adapters[0])


def test_a_gradient_scaler(twins: list[PreTrainedModel]) -> None:
    """float16 with scaled losses, the way of GPUs without bfloat16; the scale is the client's."""
    tuned = adapted(twins[1])
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    losses = []
    for _ in range(4):
        batch = tiny.tokens()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = tuned(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert scaler.get_scale() == 2.0**10


def test_float64(twins: list[PreTrainedModel]) -> None:
    """Activations in more precision than the weights have."""
    found = []
    for model in twins:
        with torch.no_grad():
            found.append(model.double()(tiny.tokens()).logits)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
