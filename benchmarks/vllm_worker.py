"""The process of `vllm_cpu.py` that runs in vLLM's own environment: units of work on command.

``vllm_worker.py MODEL ADAPTER...``: folders. Commands are JSON lines on standard input, outcomes
JSON lines on standard output, as `worker.py`; what vLLM prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from typing import Any

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

from vllm import LLM, SamplingParams  # noqa: E402  (it prints)
from vllm.lora.request import LoRARequest  # noqa: E402


def make(model: str, adapters: list[str]) -> LLM:
    """As an operator would start it for so many adapters, without compiling the model."""
    return LLM(
        model,
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,  # every prompt here is another
        enable_lora=True,
        max_loras=len(adapters),
        max_lora_rank=16,
        max_num_seqs=len(adapters),
        max_model_len=2048,
    )


def timed(llm: LLM, loras: list[LoRARequest], context: int, tokens: int) -> float:
    """Seconds for one prompt of ``context`` random tokens for each adapter, and ``tokens`` more."""
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    prompts: list[Any] = [
        {"prompt_token_ids": random.choices(range(vocabulary), k=context)} for _ in loras
    ]
    how = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    started_s = time.perf_counter()
    llm.generate(prompts, how, lora_request=loras, use_tqdm=False)
    return time.perf_counter() - started_s


def main() -> None:
    model, *adapters = sys.argv[1:]
    llm = make(model, adapters)
    loras = [LoRARequest(str(n), n, folder) for n, folder in enumerate(adapters, 1)]
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        context, tokens = command["context"], command.get("tokens", 0)
        first_s = timed(llm, loras, context, 1)  # with the prompts comes the first token
        rates = {"prefill": len(loras) * context / first_s}
        if tokens:
            all_s = timed(llm, loras, context, 1 + tokens)
            rates["decode"] = len(loras) * tokens / (all_s - first_s)
        print(json.dumps(rates), file=answers, flush=True)


if __name__ == "__main__":
    main()
