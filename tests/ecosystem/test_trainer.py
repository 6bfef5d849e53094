"""`transformers.Trainer` as its documentation uses it, on a remote base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import outcomes
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from symbiosis import Session

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gradient accumulation": {"gradient_accumulation_steps": 2},
    "checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "workers": {"dataloader_num_workers": 2},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "noisy embeddings": {"neftune_noise_alpha": 5.0},
    "another optimizer": {"optim": "adafactor"},
    "schedule and clipping": {"lr_scheduler_type": "cosine", "max_grad_norm": 0.1},
}


def build(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tokenized: Dataset,
    output_dir: Path,
    **options: Any,
) -> Trainer:
    set_seed(0)
    peft_config = LoraConfig(
        task_type=TaskType.CAUSAL_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.1
    )
    settings: dict[str, Any] = {
        "output_dir": str(output_dir),
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return Trainer(
        model=get_peft_model(model, peft_config),
        args=TrainingArguments(**{**settings, **options}),
        train_dataset=tokenized,
        eval_dataset=tokenized.select(range(6)),
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm=False),
    )


def logged(trainer: Trainer, what: str) -> list[float]:
    return [entry[what] for entry in trainer.state.log_history if what in entry]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_training(
    twins: list[PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    tokenized: Dataset,
    tmp_path: Path,
    variant: str,
) -> None:
    runs = []
    for model in twins:
        runs.append(build(model, tokenizer, tokenized, tmp_path, **VARIANTS[variant]))
        runs[-1].train()
    local, remote = runs
    outcomes.assert_equal(outcomes.adapter_of(remote.model), outcomes.adapter_of(local.model))
    outcomes.assert_trained(outcomes.adapter_of(remote.model))
    assert logged(remote, "loss") == logged(local, "loss")
    assert len(logged(remote, "loss")) == 3


def test_evaluating_keeping_the_best_and_resuming(
    twins: list[PreTrainedModel],
    session: Session,
    tokenizer: PreTrainedTokenizerFast,
    tokenized: Dataset,
    tmp_path: Path,
) -> None:
    """Checkpoints hold the adapter alone; a run that is cut short goes on as if it had not been."""
    options = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
    }
    trained = []
    for name, model in zip(("local", "remote"), twins, strict=True):
        trainer = build(model, tokenizer, tokenized, tmp_path / name, max_steps=4, **options)
        trainer.train()
        trained.append(trainer)
    local, remote = trained
    assert logged(remote, "eval_loss") == logged(local, "eval_loss")
    assert len(logged(remote, "eval_loss")) == 2
    expected = outcomes.adapter_of(local.model)
    outcomes.assert_equal(outcomes.adapter_of(remote.model), expected)
    saved = {path.name for path in (tmp_path / "remote" / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in saved
    assert "model.safetensors" not in saved

    resumed = build(
        session.model(), tokenizer, tokenized, tmp_path / "remote", max_steps=4, **options
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "remote" / "checkpoint-2"))
    outcomes.assert_equal(outcomes.adapter_of(resumed.model), expected)


def test_predicting(
    twins: list[PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    tokenized: Dataset,
    tmp_path: Path,
) -> None:
    predictions = []
    for model in twins:
        trainer = build(model, tokenizer, tokenized, tmp_path)
        predictions.append(trainer.predict(tokenized.select(range(5))).predictions)
    assert (predictions[0] == predictions[1]).all()


def test_a_classifier(
    session: Session,
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    texts: Dataset,
    tmp_path: Path,
) -> None:
    """Another head than the hosted one: PEFT trains LoRA and the new head, and saves both."""

    def label(rows: dict[str, list[str]]) -> dict[str, Any]:
        return {**tokenizer(rows["text"]), "label": [int("cat" in text) for text in rows["text"]]}

    labelled = texts.map(label, batched=True, remove_columns=["text"])
    adapters = []
    local = AutoModelForSequenceClassification.from_pretrained(folder)
    remote = session.model(auto_class=AutoModelForSequenceClassification)
    remote.score.load_state_dict(local.score.state_dict())
    for model in (local, remote):
        set_seed(0)
        model = get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS, r=4))
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(tmp_path),
                learning_rate=1e-2,
                max_steps=3,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=labelled,
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer=tokenizer),
        )
        trainer.train()
        adapters.append(outcomes.adapter_of(trainer.model))
    outcomes.assert_equal(adapters[1], adapters[0])
    assert any("score" in name for name in adapters[1])


def test_a_saved_adapter_works_on_the_whole_model(
    twins: list[PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    tokenized: Dataset,
    tmp_path: Path,
    ids: torch.Tensor,
) -> None:
    local, remote = twins
    trainer = build(remote, tokenizer, tokenized, tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(local, tmp_path / "adapter")
    trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, trainer.model(ids).logits)
