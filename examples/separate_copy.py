"""One of five separate processes that the demo is compared with: the whole model, plain peft.

``separate_copy.py MODEL METHOD DATA LEARNING_RATE`` trains a few steps with the whole model in
this process; with METHOD ``none`` it generates. Then it waits a little, so that all five are
alive at once while their memory is measured. No symbiosis in here.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import (
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

STEPS = 4
BATCH = 8
TOGETHER_S = 20


def main() -> None:
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    started_s = time.monotonic()
    folder, method = sys.argv[1], sys.argv[2]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if method == "none":
        ids = tokenizer("def read_lines(path):\n", return_tensors="pt")
        model.generate(**ids, max_new_tokens=200, do_sample=True)
    else:
        train(model, tokenizer, method, Path(sys.argv[3]), float(sys.argv[4]))
    time.sleep(max(0.0, TOGETHER_S - (time.monotonic() - started_s)))


def train(model: torch.nn.Module, tokenizer: Any, method: str, data: Path, lr: float) -> None:
    configs = {
        "lora": LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        "ia3": IA3Config(task_type="CAUSAL_LM"),
        "prefix": PrefixTuningConfig(num_virtual_tokens=20, task_type="CAUSAL_LM"),
        "p-tuning": PromptEncoderConfig(
            num_virtual_tokens=20, encoder_hidden_size=256, task_type="CAUSAL_LM"
        ),
    }
    adapted = get_peft_model(model, configs[method])
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr)
    examples = [json.loads(line) for line in data.read_text().splitlines()]
    for step in range(STEPS):
        texts = [e["prompt"] + e["completion"] for e in examples[step * BATCH :][:BATCH]]
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        adapted(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main()
