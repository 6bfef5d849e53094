"""A client's ordinary work on the base model of this project, as its executor sees it."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from recorder import Recorder, Seen
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from symbiosis import Session, connect

BASE = Path(__file__).parents[2] / "base" / "model"
LENGTH = 256
WINDOWS = 5
TRAINED_WINDOWS = 4
RANK = 8
ADAPTED_LAYER = 2
PROMPT = 16
"""Tokens that are sought among the whole vocabulary; each costs the model's first layers on every
token that there is."""
VOCABULARY = 4096


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a recorder saw of one client, and what the client knows (the truth)."""

    prompt: list[Seen]  # of the first `PROMPT` ids, without an adapter
    again: list[Seen]  # of the same
    forward: list[Seen]  # of `ids`, with a LoRA
    backward: list[Seen]  # of a training step on the first windows, forward included
    ids: Tensor  # (WINDOWS, LENGTH)
    labels: Tensor  # (TRAINED_WINDOWS, LENGTH - 1): of every position but the last
    delta: Tensor  # (O, I): BA of `up_proj` in `ADAPTED_LAYER`
    numbers: dict[str, int]  # weight ids by name
    recorder: Recorder
    session: Session

    def weight(self, name: str) -> int:
        """The id of a weight by the end of its name."""
        return next(id for full, id in self.numbers.items() if full.endswith(f"{name}.weight"))


Record = Callable[..., Traffic]


def whole_model() -> LlamaForCausalLM:
    """What an attacker has: the base."""
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()


def text() -> Tensor:
    """Real text, (WINDOWS, LENGTH): source code of the standard library."""
    tokenizer = AutoTokenizer.from_pretrained(BASE, model_max_length=1 << 20)
    module = inspect.getmodule(ArgumentParser)
    assert module is not None
    return torch.tensor(tokenizer(inspect.getsource(module))["input_ids"][: WINDOWS * LENGTH]).view(
        WINDOWS, LENGTH
    )


def record(recorder: Recorder, ids: Tensor, **options: object) -> Traffic:
    """Work through ``recorder``: a prompt again and again, then a forward pass and a training step
    with a random LoRA of the kind that people train. ``options``: of `symbiosis.connect`."""
    session = connect(recorder.url, arena_bytes=0, **options)  # type: ignore[arg-type]
    torch.manual_seed(0)
    settings = peft.LoraConfig(
        r=RANK,
        target_modules=["q_proj", "v_proj", "up_proj", "down_proj"],
        init_lora_weights=False,
    )
    model = peft.get_peft_model(session.model(), settings)
    with torch.no_grad():
        ends = []
        with model.disable_adapter():
            for _ in range(3):  # once to learn which products share an input
                model(ids[:1, :PROMPT])
                ends.append(len(recorder.seen))
        model(ids)
    ends.append(len(recorder.seen))
    trained = ids[:TRAINED_WINDOWS]
    model(trained, labels=trained).loss.backward()
    up = model.get_submodule(f"base_model.model.model.layers.{ADAPTED_LAYER}.mlp.up_proj")
    return Traffic(
        *(recorder.seen[a:b] for a, b in itertools.pairwise([*ends, len(recorder.seen)])),
        ids,
        trained[:, 1:],
        up.get_delta_weight("default").detach(),
        {name: weight.id for weight in session.weights.values() for name in weight.names},
        recorder,
        session,
    )
