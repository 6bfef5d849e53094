"""transformers' own generation on a remote base: pipelines, drafts, caches, streaming.

Each way is run on the whole local model and on the remote one; the tokens must be the same.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    QuantizedCache,
    StaticCache,
    TextIteratorStreamer,
    pipeline,
    set_seed,
)

import tiny
from symbiosis import Executor, connect

Serve = Callable[..., tuple[Executor, str]]

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_p": 0.9, "temperature": 0.8},
    "beams": {"num_beams": 3, "do_sample": False},
    "several answers": {"do_sample": True, "num_return_sequences": 3},
    "no repetition": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "do_sample": False},
    "classifier-free guidance": {"guidance_scale": 1.5, "do_sample": False},
    "without a cache": {"use_cache": False, "do_sample": False},
    "static cache": {"cache_implementation": "static", "do_sample": False},
    "quantised cache": {
        "cache_implementation": "quantized",
        "cache_config": {"backend": "quanto", "nbits": 4, "residual_length": 4, "q_group_size": 16},
        "do_sample": False,
    },
    "chunked prefill": {"prefill_chunk_size": 3, "do_sample": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 3, "do_sample": False},
}


@pytest.fixture(autouse=True)
def without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """quanto compiles its unpacking of four-bit numbers at the first use, for minutes."""
    from optimum.quanto.library.extensions import get_extension

    def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
        return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])

    monkeypatch.setattr(get_extension("quanto_cpp"), "_lib", SimpleNamespace(unpack=unpack))


def generated(model: PreTrainedModel, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    set_seed(0)
    found = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=10,
        min_new_tokens=10,
        **options,
    )
    assert isinstance(found, torch.Tensor)
    return found


@pytest.mark.parametrize("way", WAYS)
def test_generating(twins: list[PreTrainedModel], ids: torch.Tensor, way: str) -> None:
    if way == "prompt lookup":
        ids = torch.cat([ids[:1], ids[:1]], dim=1)  # something to find; one row
    expected, found = (generated(model, ids, **WAYS[way]) for model in twins)
    assert torch.equal(found, expected)


def test_generating_with_an_adapter(twins: list[PreTrainedModel], ids: torch.Tensor) -> None:
    found = []
    for model in twins:
        set_seed(0)
        tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
        found.append([generated(tuned, ids, **WAYS[way]) for way in ("greedy", "static cache")])
    for ours, expected in zip(found[1], found[0], strict=True):
        assert torch.equal(ours, expected)


def test_two_ways_of_assistance(twins: list[PreTrainedModel], serve: Serve) -> None:
    """A small model drafts for a large one; each of the two may be local or remote."""
    draft = tiny.llama(num_hidden_layers=1, vocab_size=304)
    _, url = serve(draft)
    ids = tiny.tokens(1, 6)
    local, remote = twins
    expected = generated(local, ids, do_sample=False)
    with connect(url) as small:
        for model in (local, remote):
            for assistant in (draft, small.model()):
                options = {"assistant_model": assistant, "do_sample": False}
                assert torch.equal(generated(model, ids, **options), expected)


def test_drafting_with_the_first_layers(twins: list[PreTrainedModel]) -> None:
    """Self-speculation leaves early instead of asking another model."""
    ids = tiny.tokens(1, 6)
    options = {"assistant_early_exit": 1, "do_sample": False}
    expected, found = (generated(model, ids, **options) for model in twins)
    assert torch.equal(found, expected)


CACHES: dict[str, Callable[[PreTrainedModel], Any]] = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=32),
    "quantised": lambda model: QuantizedCache(
        "quanto", model.config, nbits=4, residual_length=4, q_group_size=16
    ),
}


@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_of_ones_own(twins: list[PreTrainedModel], cache: str) -> None:
    """Token by token with a cache that the caller made: every logit is the same."""
    ids = tiny.tokens(2, 12)
    found = []
    for model in twins:
        past = CACHES[cache](model)
        steps = []
        with torch.no_grad():
            for start, end in ((0, 6), (6, 7), (7, 8), (8, 12)):
                step = model(ids[:, start:end], past_key_values=past, use_cache=True)
                steps.append(step.logits)
        assert past.get_seq_length() == 12
        found.append(torch.cat(steps, 1))
    assert torch.equal(found[1], found[0])


def test_a_cached_prompt_is_used_twice(twins: list[PreTrainedModel], ids: torch.Tensor) -> None:
    import copy

    prompt, suffix = ids[:1, :4], ids[1:, :3]
    found = []
    for model in twins:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            cache = model(prompt, past_key_values=cache).past_key_values
        both = torch.cat([prompt, suffix], 1)
        for _ in range(2):
            found.append(generated(model, both, past_key_values=copy.deepcopy(cache)))
    assert all(torch.equal(one, found[0]) for one in found)


# Pipelines


PROMPTS = ["the cat sat", "a dog ran in the park and"]


@pytest.mark.parametrize("how", [{"do_sample": False}, {"do_sample": True, "top_k": 20}], ids=str)
def test_a_pipeline(
    twins: list[PreTrainedModel], tokenizer: PreTrainedTokenizerFast, how: dict[str, Any]
) -> None:
    found = []
    for model in twins:
        set_seed(0)
        generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
        found.append(generator(PROMPTS, max_new_tokens=8, batch_size=2, **how))
    assert found[1] == found[0]
    assert len(found[1]) == 2
    assert found[1][0][0]["generated_text"].startswith(PROMPTS[0])


def test_a_pipeline_that_chats(
    twins: list[PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    messages = [{"role": "user", "content": "say the cat"}]
    found = []
    for model in twins:
        generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
        found.append(generator(messages, max_new_tokens=8, do_sample=False))
    assert found[1] == found[0]
    assert found[1][0]["generated_text"][-1]["role"] == "assistant"


def test_streaming(twins: list[PreTrainedModel], tokenizer: PreTrainedTokenizerFast) -> None:
    """Generation in a thread of its own, words as they come."""
    inputs = tokenizer(["the cat sat"], return_tensors="pt")
    found = []
    for model in twins:
        streamer = TextIteratorStreamer(tokenizer)
        options = {**inputs, "streamer": streamer, "max_new_tokens": 8, "do_sample": False}
        options.pop("token_type_ids", None)
        thread = Thread(target=model.generate, kwargs=options)
        thread.start()
        found.append(list(streamer))
        thread.join()
    assert found[1] == found[0]
    assert len(found[1]) > 3
