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


def decode(llm: LLM, loras: list[LoRARequest], context: int, tokens: int) -> dict[str, float]:
    """A prompt of ``context`` random tokens and ``tokens`` more for each adapter, all at once:
    tokens/s of the prompts, until each has its first token, and of the tokens after that."""
    engine = llm.llm_engine
    vocabulary = engine.model_config.get_vocab_size()
    how = SamplingParams(temperature=0, max_tokens=1 + tokens, ignore_eos=True, detokenize=False)
    started_s = time.perf_counter()
    for lora in loras:
        prompt: Any = {"prompt_token_ids": random.choices(range(vocabulary), k=context)}
        engine.add_request(f"{lora.lora_name}-{started_s}", prompt, how, lora_request=lora)
    made: dict[str, int] = {}
    begun_s, begun = 0.0, 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            made[output.request_id] = len(output.outputs[0].token_ids)
        if not begun_s and len(made) == len(loras):
            begun_s, begun = time.perf_counter(), sum(made.values())
    ended_s = time.perf_counter()
    return {
        "prefill": len(loras) * context / (begun_s - started_s),
        "decode": (sum(made.values()) - begun) / (ended_s - begun_s),
    }


def main() -> None:
    model, *adapters = sys.argv[1:]
    llm = make(model, adapters)
    loras = [LoRARequest(str(n), n, folder) for n, folder in enumerate(adapters, 1)]
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(decode(llm, loras, **json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
