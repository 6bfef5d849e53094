"""Rows become token ids and labels; labels of -100 carry no loss.

The first token of an example never carries loss: nothing precedes it. Knows tokenizers; knows no
model and no files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from symbiosis.errors import DataError
from symbiosis.jobs.data import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label that torch's cross-entropy passes over."""


class Encoded(TypedDict):
    """One example: two lists of equal length."""

    input_ids: list[int]
    labels: list[int]


def encode(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[Encoded]:
    """Token ids and labels of every row, cut to ``max_length`` tokens.

    Raises DataError that names the row if nothing of it would be learned.
    """
    encoder = _Encoder(tokenizer, max_length)
    return [encoder.encode(row) for row in rows]


def loss_scope(row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
    """In words: what of a row like this carries loss."""
    if row.format == "text":
        return "every token"
    if row.format == "prompt-completion":
        return "the completion"
    if _marks_turns(tokenizer):
        return "what the assistant says"
    return "every token: the chat template does not mark what the assistant says"


def collate(examples: Sequence[Encoded], pad: int) -> dict[str, Tensor]:
    """One batch, padded on the right: int64 input_ids, attention_mask and labels (B, T)."""
    longest = max(len(example["input_ids"]) for example in examples)
    shape = (len(examples), longest)
    input_ids = torch.full(shape, pad)
    labels = torch.full(shape, IGNORED)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    for index, example in enumerate(examples):
        length = len(example["input_ids"])
        input_ids[index, :length] = torch.tensor(example["input_ids"])
        labels[index, :length] = torch.tensor(example["labels"])
        attention_mask[index, :length] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What to pad with; its value does not matter, for padding is masked."""
    for found in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(found, int):
            return found
    return 0


class _Encoder:
    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self._tokenizer: Any = tokenizer
        self._max_length = max_length
        self._end = tokenizer.eos_token_id
        self._has_template = tokenizer.chat_template is not None
        self._marks_turns = _marks_turns(tokenizer)

    def encode(self, row: Row) -> Encoded:
        ids, labels = self._by_format(row)
        length = self._max_length
        cut: Encoded = {"input_ids": ids[:length], "labels": [IGNORED, *labels[1:length]]}
        if all(label == IGNORED for label in cut["labels"]):
            raise DataError(f"{row.where}: {self._why_nothing(row, len(ids))}")
        return cut

    def _by_format(self, row: Row) -> tuple[list[int], list[int]]:
        if row.format == "messages":
            return self._chat(row)
        if row.format == "text":
            ids = self._ended(self._ids(row.values["text"]))
            return ids, list(ids)
        prompt, completion = row.values["prompt"], row.values["completion"]
        if isinstance(prompt, list):
            whole = self._templated(row, [*prompt, *completion])["input_ids"]
            start = self._templated(row, prompt, add_generation_prompt=True)["input_ids"]
            return whole, _masked(whole, _common(start, whole))
        return self._pair(prompt, completion)

    def _pair(self, prompt: str, completion: str) -> tuple[list[int], list[int]]:
        """The prompt's tokens stay what they are at generation, whatever follows them."""
        start = self._unended(self._ids(prompt))
        whole = self._ids(prompt + completion)
        if whole[: len(start)] != start:
            whole = start + self._ids(completion, add_special_tokens=False)
        whole = self._ended(whole)
        return whole, _masked(whole, len(start))

    def _chat(self, row: Row) -> tuple[list[int], list[int]]:
        if not self._marks_turns:
            ids = self._templated(row, row.values["messages"])["input_ids"]
            return ids, list(ids)
        found = self._templated(row, row.values["messages"], return_assistant_tokens_mask=True)
        ids, mask = found["input_ids"], found["assistant_masks"]
        return ids, [id if said else IGNORED for id, said in zip(ids, mask, strict=True)]

    def _templated(self, row: Row, messages: list[dict[str, str]], **options: bool) -> Any:
        from jinja2 import TemplateError

        if not self._has_template:
            raise DataError(
                f"{row.where}: chat messages need a chat template, and the hosted model's "
                f'tokenizer has none; use {{"prompt": "...", "completion": "..."}} with texts'
            )
        try:
            return self._tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, **options
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(f"{row.where}: the chat template refuses it: {error}") from None

    def _ids(self, text: str, **options: bool) -> list[int]:
        return list(self._tokenizer(text, verbose=False, **options)["input_ids"])

    def _ended(self, ids: list[int]) -> list[int]:
        return ids if self._end is None or ids[-1:] == [self._end] else [*ids, self._end]

    def _unended(self, ids: list[int]) -> list[int]:
        return ids[:-1] if self._end is not None and ids[-1:] == [self._end] else ids

    def _why_nothing(self, row: Row, length: int) -> str:
        if length > self._max_length:
            return (
                f"the example is {length} tokens long, and cut to --max-length "
                f"{self._max_length} nothing with loss is left; raise it or shorten the example"
            )
        if row.format == "messages":
            return "no token carries loss: is there a message of the assistant?"
        return f"nothing to learn in an example of {length} token(s)"


def _marks_turns(tokenizer: PreTrainedTokenizerBase) -> bool:
    """The chat template has markers around what the assistant says."""
    return re.search(r"\{%-?\s*generation\b", str(tokenizer.chat_template)) is not None


def _masked(ids: list[int], start: int) -> list[int]:
    return [IGNORED] * start + ids[start:]


def _common(first: list[int], second: list[int]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
