from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from symbiosis.errors import DataError
from symbiosis.jobs.data import Format, Row
from symbiosis.jobs.encode import IGNORED, collate, encode, loss_scope, pad_id
from tiny_files import MARKED, TURNS

END = 1


def encoded(
    tokenizer: PreTrainedTokenizerFast, format: Format, max_length: int = 100, **values: Any
) -> tuple[list[int], list[int]]:
    (example,) = encode([Row(Path("f.jsonl"), 7, format, values)], tokenizer, max_length)
    assert len(example["input_ids"]) == len(example["labels"])
    assert example["labels"][0] == IGNORED
    return example["input_ids"], example["labels"]


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def said(tokenizer: PreTrainedTokenizerFast, labels: list[int]) -> str:
    """The text that carries loss."""
    return str(tokenizer.decode([label for label in labels if label != IGNORED]))


def test_text_is_learned_whole_and_ended(tokenizer: PreTrainedTokenizerFast) -> None:
    ids, labels = encoded(tokenizer, "text", text="the cat")
    assert ids == [*tokenizer("the cat")["input_ids"], END]
    assert labels[1:] == ids[1:]


def test_only_the_completion_carries_loss(tokenizer: PreTrainedTokenizerFast) -> None:
    ids, labels = encoded(tokenizer, "prompt-completion", prompt="say: ", completion="the cat")
    assert tokenizer.decode(ids) == "say: the cat</s>"
    assert said(tokenizer, labels) == "the cat</s>"


def test_the_prompts_tokens_are_those_of_generation(tokenizer: PreTrainedTokenizerFast) -> None:
    """Even where tokens of the whole text would reach across the boundary."""
    prompt = tokenizer("th")["input_ids"]
    assert tokenizer("the")["input_ids"][: len(prompt)] != prompt, "the case is not what it seems"
    ids, labels = encoded(tokenizer, "prompt-completion", prompt="th", completion="e")
    assert ids[: len(prompt)] == prompt
    assert said(tokenizer, labels) == "e</s>"


def test_a_tokenizer_that_adds_both_ends(tokenizer: PreTrainedTokenizerFast) -> None:
    both = copy.deepcopy(tokenizer)
    both.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", END)]
    )
    ids, labels = encoded(both, "prompt-completion", prompt="say: ", completion="cat")
    assert both.decode(ids) == "<s>say: cat</s>"
    assert said(both, labels) == "cat</s>"
    ids, labels = encoded(both, "prompt-completion", prompt="th", completion="e")
    assert both.decode(ids) == "<s>the</s>"
    assert said(both, labels) == "e</s>"


def test_messages_with_marked_turns(tokenizer: PreTrainedTokenizerFast) -> None:
    marked = with_template(tokenizer, MARKED)
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "the cat"},
        {"role": "user", "content": "and"},
        {"role": "assistant", "content": "a dog"},
    ]
    ids, labels = encoded(marked, "messages", messages=messages)
    assert said(marked, labels) == "the cat</s>a dog</s>"
    assert marked.decode(ids).startswith("<user>hi</s><assistant>the cat</s>")
    with pytest.raises(DataError, match=r"f.jsonl:7: no token carries loss: is there a message of"):
        encoded(marked, "messages", messages=messages[:1])


def test_messages_without_marks_are_learned_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    unmarked = with_template(tokenizer, TURNS)
    ids, labels = encoded(unmarked, "messages", messages=[{"role": "user", "content": "hi"}])
    assert labels[1:] == ids[1:]


def test_prompt_and_completion_as_messages(tokenizer: PreTrainedTokenizerFast) -> None:
    marked = with_template(tokenizer, MARKED)
    ids, labels = encoded(
        marked,
        "prompt-completion",
        prompt=[{"role": "user", "content": "hi"}],
        completion=[{"role": "assistant", "content": "the cat"}],
    )
    assert marked.decode(ids) == "<user>hi</s><assistant>the cat</s>"
    assert said(marked, labels) == "the cat</s>"


def test_no_template_and_a_template_that_refuses(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(DataError, match=r"f.jsonl:7: chat messages need a chat template"):
        encoded(tokenizer, "messages", messages=messages)
    refusing = with_template(tokenizer, "{{ raise_exception('system first') }}")
    with pytest.raises(DataError, match=r"f.jsonl:7: the chat template refuses it: system first"):
        encoded(refusing, "messages", messages=messages)


def test_cutting(tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"prompt": "say: the cat sat ", "completion": "on the mat"}
    whole, _ = encoded(tokenizer, "prompt-completion", **row)
    prompt_length = len(tokenizer(row["prompt"])["input_ids"])
    ids, labels = encoded(tokenizer, "prompt-completion", prompt_length + 1, **row)
    assert ids == whole[: prompt_length + 1]
    assert [label != IGNORED for label in labels] == [False] * prompt_length + [True]
    with pytest.raises(DataError, match=r"f.jsonl:7: the example is \d+ tokens long, and cut to"):
        encoded(tokenizer, "prompt-completion", prompt_length, **row)


def test_one_token_teaches_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"f.jsonl:7: nothing to learn"):
        encoded(tokenizer, "text", text="</s>")


def test_collate() -> None:
    batch = collate(
        [
            {"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]},
            {"input_ids": [8, 9], "labels": [IGNORED, 9]},
        ],
        pad=2,
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED, 9, IGNORED]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_pad_id(tokenizer: PreTrainedTokenizerFast) -> None:
    assert pad_id(tokenizer) == 2
    without = copy.deepcopy(tokenizer)
    without.pad_token = None
    assert pad_id(without) == END


@pytest.mark.parametrize(
    ("format", "template", "scope"),
    [
        ("text", None, "every token"),
        ("prompt-completion", None, "the completion"),
        ("messages", MARKED, "what the assistant says"),
        ("messages", MARKED.replace("{% generation", "{%- generation"), "what the assistant"),
        ("messages", TURNS, "every token: the chat template does not mark"),
    ],
)
def test_loss_scope(
    tokenizer: PreTrainedTokenizerFast, format: Format, template: str | None, scope: str
) -> None:
    changed = with_template(tokenizer, template or "")
    assert loss_scope(Row(Path("f"), 1, format, {}), changed).startswith(scope)
