"""A lone client against the same model run whole: logits, loss, gradients, a trained adapter.

In fp32 on the CPU they must agree bit for bit; prints the largest difference of each.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

import symbiosis
from harness import LLAMA_110M, executor, make_model, save


def adapted(model: PreTrainedModel) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))


def trainable(model: PeftModel) -> dict[str, torch.Tensor]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in trainable(model).items() if p.grad is not None}


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def train(model: PeftModel, steps: int) -> dict[str, torch.Tensor]:
    """AdamW on random tokens from a fixed seed; the adapter afterwards."""
    generator = torch.Generator().manual_seed(2)
    optimizer = torch.optim.AdamW(list(trainable(model).values()), 1e-3)
    for _ in range(steps):
        ids = torch.randint(0, model.config.vocab_size, (2, 64), generator=generator)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in trainable(model).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    steps = parser.parse_args().steps
    folder = make_model("llama-110m", LLAMA_110M)
    with executor(folder) as served, symbiosis.connect(served.unix) as base:
        ids = torch.randint(0, 32000, (2, 128), generator=torch.Generator().manual_seed(0))
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        split = base.model()
        with torch.no_grad():
            logits = (whole(ids).logits - split(ids).logits).abs().max().item()
        whole.requires_grad_(False)
        a, b = adapted(whole), adapted(split)
        losses = [model(ids, labels=ids).loss for model in (a, b)]
        for loss in losses:
            loss.backward()
        grads = [gradients(model) for model in (a, b)]
        result: dict[str, Any] = {
            "model": "Llama 110M, fp32",
            "logits": logits,
            "loss": abs(losses[0] - losses[1]).item(),
            "gradients": difference(*grads),
        }
        a.zero_grad()
        b.zero_grad()
        result[f"adapter after {steps} steps"] = difference(train(a, steps), train(b, steps))
    for name, value in result.items():
        print(f"largest difference of {name}: {value}" if name != "model" else value)
    save("exactness", result)


if __name__ == "__main__":
    main()
