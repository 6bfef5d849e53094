"""Data in worker processes: torch's DataLoader and ``datasets.map``, with and without the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import outcomes
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    set_seed,
)

import tiny
from symbiosis import Session

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.mark.parametrize(
    "options", [{}, {"persistent_workers": True, "prefetch_factor": 4}], ids=str
)
def test_training_with_two_workers(
    twins: list[PreTrainedModel],
    tokenized: Dataset,
    tokenizer: PreTrainedTokenizerFast,
    options: dict[str, Any],
) -> None:
    """Workers that are forked while the session is open leave it alone."""
    adapters = []
    for model in twins:
        set_seed(0)
        loader = DataLoader(
            tokenized,
            batch_size=4,
            shuffle=True,
            num_workers=2,
            collate_fn=DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm=False),
            **options,
        )
        tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))
        optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(2):
            for batch in loader:
                tuned(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        adapters.append(outcomes.adapter_of(tuned))
    outcomes.assert_equal(adapters[1], adapters[0])
    outcomes.assert_trained(adapters[1])


class Hidden(IterableDataset[torch.Tensor]):
    """Features that a frozen base computes in the worker, each worker its share."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __iter__(self) -> Iterator[torch.Tensor]:
        worker = get_worker_info()
        for seed in range(worker.id, 6, worker.num_workers):
            with torch.no_grad():
                yield self.model(tiny.tokens(1, 5, seed=seed)).logits[0, -1]


def test_features_computed_in_two_workers(twins: list[PreTrainedModel]) -> None:
    local, remote = twins
    loader = DataLoader(Hidden(remote), batch_size=1, num_workers=2)
    with torch.no_grad():
        expected = [local(tiny.tokens(1, 5, seed=seed)).logits[0, -1] for seed in range(6)]
    # Not bit for bit: the two workers are two clients, whose exchanges may share a batch.
    torch.testing.assert_close(torch.cat(list(loader)), torch.stack(expected))


def mapped(model: PreTrainedModel, data: Dataset, **options: Any) -> list[float]:
    def last_logit(row: dict[str, Any]) -> dict[str, Any]:
        with torch.no_grad():
            return {"score": float(model(torch.tensor([row["input_ids"]])).logits[0, -1, 0])}

    return list(data.map(last_logit, **options)["score"])


@pytest.mark.parametrize("processes", [None, 2])
def test_features_computed_by_map(
    twins: list[PreTrainedModel], tokenized: Dataset, processes: int | None
) -> None:
    options = {"num_proc": processes, "new_fingerprint": f"with {processes}"}
    expected, found = (mapped(model, tokenized, **options) for model in twins)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)  # two processes may share a batch


@pytest.mark.fetches
def test_a_map_without_a_fingerprint_of_its_own(
    twins: list[PreTrainedModel], session: Session, tokenized: Dataset
) -> None:
    """``datasets`` then names its file by a hash of all that the function refers to, the
    weights among it: one fetch of each."""
    expected, found = (mapped(model, tokenized) for model in twins)
    assert found == expected
    assert session.stats().fetched_bytes == session.welcome["bytes"]
