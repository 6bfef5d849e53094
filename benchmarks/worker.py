"""One process of a benchmark: a model, whole or split, and units of work on command.

``worker.py MODEL THREADS SEED [PRIVACY]``: MODEL is a folder or an executor's URL, PRIVACY the
options of a `symbiosis.Privacy` as JSON. Commands are JSON lines
on standard input, outcomes JSON lines on standard output; the end of input ends the process.
"""

from __future__ import annotations

import itertools
import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

import symbiosis

METHODS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    "lora8": lambda: LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "ia3": lambda: IA3Config(task_type="CAUSAL_LM"),
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=16, task_type="CAUSAL_LM"),
}


class Work:
    """The model and what can be done with it; every unit returns JSON."""

    def __init__(self, source: str, seed: int, privacy: dict[str, Any] | None = None) -> None:
        torch.manual_seed(seed)
        self._session: symbiosis.Session | None = None
        self._adapted: PeftModel | None = None
        self._each: dict[str, list[str]] = {}  # of several adapters in one batch
        if "://" in source:
            self._session = symbiosis.connect(
                source, name=f"bench-{seed}", privacy=symbiosis.Privacy(**(privacy or {}))
            )
            self._model: PreTrainedModel = self._session.model()
        else:
            self._model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        self._model.eval()
        self._vocabulary = self._model.config.vocab_size

    def adapt(self, method: str, checkpointing: bool = False) -> dict[str, Any]:
        """Wrap the model with an adapter and an optimizer."""
        self._model.requires_grad_(False)
        if checkpointing:
            self._model.enable_input_require_grads()
            self._model.gradient_checkpointing_enable({"use_reentrant": False})
        self._adapted = get_peft_model(self._model, METHODS[method]())
        trainable = [p for p in self._adapted.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(trainable, 1e-4)
        return {"trainable": sum(p.numel() for p in trainable)}

    def decode(self, tokens: int, context: int, pause_s: float = 0.0) -> dict[str, Any]:
        """Greedy decoding after a prompt; tokens/s of the decoding alone, and the times between
        tokens. ``pause_s``: rest after each, as for a reader."""
        model = self._adapted or self._model
        model.eval()
        ends_s = []
        with torch.no_grad():
            ids = self._sequences(context)
            out = model(ids, use_cache=True, logits_to_keep=1, **self._each)
            started_s = time.perf_counter()
            for _ in range(tokens):
                token = out.logits[:, -1:].argmax(-1)
                cache = out.past_key_values
                out = model(token, past_key_values=cache, use_cache=True, **self._each)
                ends_s.append(time.perf_counter())
                time.sleep(pause_s)
        gaps_ms = [1e3 * (b - a) for a, b in itertools.pairwise(ends_s)]
        return {**self._rate(len(ids) * tokens, started_s), "gaps_ms": gaps_ms}

    def adapt_many(self, method: str, count: int, batched: bool = False) -> dict[str, Any]:
        """Wrap the model with ``count`` adapters; `decode` and `prefill` then have a sequence for
        each. ``batched``: by `symbiosis.batch_lora`."""
        self._model.requires_grad_(False)
        self._adapted = get_peft_model(self._model, METHODS[method](), adapter_name="0")
        for number in range(1, count):
            self._adapted.add_adapter(str(number), METHODS[method]())
        self._each = {"adapter_names": list(self._adapted.peft_config)}
        if batched:
            symbiosis.batch_lora(self._adapted)
        return {}

    def prefill(self, context: int) -> dict[str, Any]:
        """One forward pass over a prompt, logits of its last token."""
        model = self._adapted or self._model
        model.eval()
        ids = self._sequences(context)
        started_s = time.perf_counter()
        with torch.no_grad():
            model(ids, logits_to_keep=1, **self._each)
        return self._rate(ids.numel(), started_s)

    def train(self, steps: int, batch: int, context: int) -> dict[str, Any]:
        """Optimizer steps on random tokens."""
        assert self._adapted is not None
        self._adapted.train()
        started_s = time.perf_counter()
        for _ in range(steps):
            ids = self._ids(batch, context)
            self._adapted(ids, labels=ids).loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad()
        return self._rate(steps * batch * context, started_s)

    def stats(self) -> dict[str, Any]:
        """What the session has cost so far; empty for a whole model."""
        if self._session is None:
            return {}
        stats = self._session.stats()
        return {name: getattr(stats, name) for name in stats.__dataclass_fields__}

    def helper_bytes(self) -> dict[str, Any]:
        """What the helper of ``masked-split`` has answered."""
        assert self._session is not None
        return {"bytes": self._session.privacy_report().masks.bytes_for_products}

    def _sequences(self, context: int) -> torch.Tensor:
        return self._ids(max(1, len(self._each.get("adapter_names", []))), context)

    def _ids(self, batch: int, context: int) -> torch.Tensor:
        return torch.randint(0, self._vocabulary, (batch, context))

    def _rate(self, tokens: int, started_s: float) -> dict[str, Any]:
        elapsed_s = time.perf_counter() - started_s
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"tokens_per_s": tokens / elapsed_s, "elapsed_s": elapsed_s, "peak_rss": peak}


def main() -> None:
    source, threads, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    privacy = json.loads(sys.argv[4]) if len(sys.argv) > 4 else None
    works = {source: Work(source, seed, privacy)}
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        at = command.pop("at", source)  # another executor, for one command
        if at not in works:
            works[at] = Work(at, seed)
        outcome = getattr(works[at], command.pop("do"))(**command)
        print(json.dumps(outcome), flush=True)


if __name__ == "__main__":
    main()
