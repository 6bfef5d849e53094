"""TRL's trainers as its documentation uses them: supervised fine-tuning and preferences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import outcomes
import pytest
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerFast, set_seed
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from symbiosis import Session

CHATS = Dataset.from_list(
    [
        {
            "messages": [
                {"role": "user", "content": f"say {number}"},
                {"role": "assistant", "content": "the cat sat on the mat " * (1 + number % 3)},
            ]
        }
        for number in range(12)
    ]
)

PAIRS = Dataset.from_list(
    [
        {
            "prompt": [{"role": "user", "content": f"say {number}"}],
            "chosen": [{"role": "assistant", "content": "the cat sat"}],
            "rejected": [{"role": "assistant", "content": "a dog ran in the park"}],
        }
        for number in range(12)
    ]
)


def settings(folder: Path, **options: Any) -> dict[str, Any]:
    common = {
        "output_dir": str(folder),
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
    }
    return {**common, **options}


def logged(trainer: Any, what: str) -> list[float]:
    return [entry[what] for entry in trainer.state.log_history if what in entry]


SFT: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "answers only": {"assistant_only_loss": True},
    "packing": {"packing": True, "max_length": 32},
    "plain cross-entropy": {"loss_type": "nll"},
    "chunked cross-entropy": {"loss_type": "chunked_nll"},
    "dynamic fine-tuning": {"loss_type": "dft"},
    "accumulation without checkpointing": {
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": False,
    },
}


@pytest.mark.parametrize("variant", SFT)
def test_supervised_fine_tuning(
    twins: list[PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    variant: str,
) -> None:
    runs = []
    for model in twins:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(**settings(tmp_path, **SFT[variant])),
            train_dataset=CHATS,
            processing_class=tokenizer,
            peft_config=LoraConfig(),
        )
        trainer.train()
        runs.append(trainer)
    local, remote = runs
    outcomes.assert_equal(outcomes.adapter_of(remote.model), outcomes.adapter_of(local.model))
    outcomes.assert_trained(outcomes.adapter_of(remote.model))
    assert logged(remote, "loss") == logged(local, "loss")


DPO: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "without checkpointing": {"gradient_checkpointing": False},
    "hinge": {"loss_type": "hinge"},
}


def trained_on_pairs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path, **options: Any
) -> DPOTrainer:
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(**settings(folder, **options)),
        train_dataset=PAIRS,
        processing_class=tokenizer,
        peft_config=LoraConfig(),
    )
    assert trainer.ref_model is None
    trainer.train()
    return trainer


@pytest.mark.parametrize("variant", DPO)
def test_preferences(
    twins: list[PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    variant: str,
) -> None:
    """The reference is the base itself: the adapter is switched off for it."""
    runs = [trained_on_pairs(model, tokenizer, tmp_path, **DPO[variant]) for model in twins]
    assert_same_preferences(*runs)


@pytest.mark.fetches
def test_preferences_with_references_computed_first(
    twins: list[PreTrainedModel],
    session: Session,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    """TRL names the file of precomputed references by a hash of all weights: one fetch of each."""
    options = {"precompute_ref_log_probs": True}
    assert_same_preferences(*[trained_on_pairs(m, tokenizer, tmp_path, **options) for m in twins])
    assert session.stats().fetched_bytes == session.welcome["bytes"]


def test_preferences_over_an_adapter_that_was_trained_before(
    twins: list[PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """A model that has an adapter is compared with a frozen copy of that adapter."""
    runs = []
    for model in twins:
        set_seed(0)
        adapted = get_peft_model(model, LoraConfig(init_lora_weights=False, lora_alpha=1))
        trainer = DPOTrainer(
            model=adapted,
            args=DPOConfig(**settings(tmp_path)),
            train_dataset=PAIRS,
            processing_class=tokenizer,
        )
        trainer.train()
        assert "ref" in trainer.model.peft_config
        runs.append(trainer)
    assert_same_preferences(*runs)


def assert_same_preferences(local: DPOTrainer, remote: DPOTrainer) -> None:
    outcomes.assert_equal(outcomes.adapter_of(remote.model), outcomes.adapter_of(local.model))
    outcomes.assert_trained(outcomes.adapter_of(remote.model))
    for what in ("loss", "rewards/margins", "logps/chosen"):
        assert logged(remote, what) == logged(local, what)
    margins = logged(remote, "rewards/margins")
    assert margins[-1] > margins[0]
