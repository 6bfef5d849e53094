"""What privacy costs: each mode against `plain` in one alternated run, and what it does to numbers.

Three parts. *product*: the executor's computation by itself. *work*: decode, prefill and LoRA
training of one client over TCP, with the bytes on the wire. *accuracy*: logits, and the loss after
25 steps of LoRA training, against the plain model in fp32, on the base model of this project.
Ratios are of alternated runs, with their spread: other work on the machine shows in it.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import symbiosis
from harness import LLAMA_110M, ROOT, Sample, Worker, executor, make_model, ratio, save
from quantized import held_out_text
from symbiosis.privacy.ring import quantise, ring_product

BASE = ROOT / "base" / "model"
Row = dict[str, Any]

MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "noise": {"mode": "noise"},
    "masked-local": {"mode": "masked-local"},
    "masked-local, 16 bits": {"mode": "masked-local", "bits": 16},
    "masked-split": {"mode": "masked-split"},
}
UNITS: dict[str, dict[str, Any]] = {
    "decode": {"do": "decode", "tokens": 16, "context": 32},
    "prefill": {"do": "prefill", "context": 512},
    "training": {"do": "train", "steps": 1, "batch": 2, "context": 128},
}
TOKENS = {"decode": 16 + 32, "prefill": 512, "training": 256}
"""That cross the wire in a unit, the prompt of decoding too."""


def timed(run: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    run()
    return time.perf_counter() - started_s


# The product


def product(outputs: int, inputs: int, rows: int, rounds: int) -> Row:
    """One product in fp32, in both rings, and in fp64 as an exact one could be had otherwise."""
    matrix, x = torch.randn(outputs, inputs), torch.randn(rows, inputs)
    w8, w16 = (quantise(matrix, 0, bits).numbers for bits in (8, 16))
    wide = matrix.double()
    u8 = torch.randint(-(2**31), 2**31, (rows, inputs)).int()
    u16 = torch.randint(-(2**47), 2**47, (rows, inputs))
    runs: dict[str, Callable[[], object]] = {
        "fp32": lambda: F.linear(x, matrix),
        "int8": lambda: ring_product(w8, u8),
        "int16": lambda: ring_product(w16, u16),
        "fp64": lambda: F.linear(x.double(), wide),
    }
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            taken_s = timed(run)
            if number:  # the first warms up
                samples[name].append(taken_s)
    peer = Sample(tuple(samples.pop("fp32")))
    found: Row = {"fp32_ms": peer.median * 1e3}
    for name, values in samples.items():
        against = ratio(Sample(tuple(values)), peer)
        found[name] = against.median
        found[f"{name}_spread"] = against.spread
    return found


def products(rounds: int) -> dict[str, Row]:
    found = {}
    for outputs, inputs in ((704, 256), (2048, 2048), (4096, 4096)):
        for rows in (1, 128, 512):
            row = found[f"{outputs}x{inputs}, {rows} rows"] = product(outputs, inputs, rows, rounds)
            print(
                f"{outputs:5} × {inputs:4}, {rows:3} rows: fp32 {row['fp32_ms']:7.3f} ms; int8 "
                f"{row['int8_spread']}, int16 {row['int16_spread']}, fp64 {row['fp64_spread']}",
                flush=True,
            )
    return found


# Work end to end


def work(model: Path, names: list[str], units: list[str], rounds: int) -> dict[str, Row]:
    """All modes in turn, round by round."""
    found: dict[str, Row] = {}
    masked = ("--masked", "8", "--masked", "16")
    with executor(model, *masked) as served, executor(model, "--masked", "8") as second:
        workers = {}
        for name in names:
            options = dict(MODES[name])
            if options.get("mode") == "masked-split":
                options["helper"] = second.tcp
            workers[name] = Worker(
                served.tcp, threads=os.cpu_count() or 1, passive=True, privacy=options
            ).ready()
        for unit in units:
            if unit == "training":
                for worker in workers.values():
                    worker.run(do="adapt", method="lora")
            found |= alternated(workers, unit, rounds)
        for worker in workers.values():
            worker.close()
    return found


def alternated(workers: dict[str, Worker], unit: str, rounds: int) -> dict[str, Row]:
    """One unit of work, in every mode; the first round warms up."""
    speeds: dict[str, list[float]] = {name: [] for name in workers}
    before: dict[str, Row] = {}
    for number in range(rounds + 1):
        for name, worker in workers.items():
            if number == 1:
                before[name] = counted(worker)
            speed = worker.run(**UNITS[unit])["tokens_per_s"]
            if number:
                speeds[name].append(speed)
    found = {}
    for name, worker in workers.items():
        after = counted(worker)
        tokens = rounds * TOKENS[unit]
        against = ratio(Sample(tuple(speeds[name])), Sample(tuple(speeds["plain"])))
        found[f"{unit}/{name}"] = row = {
            "tokens_per_s": Sample(tuple(speeds[name])).median,
            "ratio": against.median,
            "ratio_spread": against.spread,
            **{f"{k}_per_token": (after[k] - before[name][k]) / tokens for k in after},
        }
        print(
            f"{unit:9} {name:22} {row['tokens_per_s']:7.1f} tokens/s, {row['ratio_spread']} of "
            f"plain; a token: {row['bytes_per_token'] / 1e3:.0f} kB, from the helper "
            f"{row['helper_bytes_per_token'] / 1e3:.0f} kB, "
            f"{row['exchanges_per_token']:.2f} exchanges",
            flush=True,
        )
    return found


def counted(worker: Worker) -> Row:
    stats = worker.run(do="stats")
    return {
        "bytes": stats["bytes_sent"] + stats["bytes_received"],
        "helper_bytes": worker.run(do="helper_bytes")["bytes"],
        "exchanges": stats["exchanges"],
    }


# Accuracy


@torch.no_grad()
def logits_of(model: PreTrainedModel, text: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(row[None]).logits for row in text]).double()


def trained(model: PreTrainedModel, text: torch.Tensor) -> float:
    """The loss on the next batch after 25 steps of LoRA."""
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], 1e-3)
    for step in range(25):
        batch = text[4 * step : 4 * step + 4]
        adapted(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return float(adapted(text[-4:], labels=text[-4:]).loss)


def whole(bits: int | None = None) -> PreTrainedModel:
    """The base in one process; with ``bits`` its matrices rounded to such integers."""
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    for module in model.model.layers.modules():
        if bits is not None and isinstance(module, torch.nn.Linear):
            made = quantise(module.weight, 0, bits)
            module.weight.data = made.numbers * made.scales[:, None]
    return model


def accuracy() -> dict[str, Row]:
    text = held_out_text(AutoTokenizer.from_pretrained(BASE), 104, 64)
    wanted, loss = logits_of(whole(), text[:16]), trained(whole(), text)
    found: dict[str, Row] = {}

    def note(name: str, make: Callable[[], PreTrainedModel]) -> None:
        logits = logits_of(make(), text[:16])
        found[name] = row = {
            "logits_relative_error": float((logits - wanted).norm() / wanted.norm()),
            "argmax_agreement": float((logits.argmax(-1) == wanted.argmax(-1)).double().mean()),
            "loss_after_25_steps": (after := trained(make(), text)),
            "loss_difference": after - loss,
        }
        print(
            f"{name:28} logits {row['logits_relative_error']:.1e}, argmax "
            f"{row['argmax_agreement']:.2%}, loss {after:.6f} ({after - loss:+.1e})",
            flush=True,
        )

    for bits in (8, 16):
        note(f"int{bits} weights, one process", lambda bits=bits: whole(bits))  # type: ignore[misc]
    with executor(BASE, "--dtype", "float32", "--masked", "8", "--masked", "16") as served:
        for name, options in MODES.items():
            if options.get("mode") != "masked-split":  # the same numbers as masked-local
                with symbiosis.connect(served.tcp, privacy=symbiosis.Privacy(**options)) as session:
                    note(name, session.model)
    found["fp32, one process"] = {"loss_after_25_steps": loss}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--units", nargs="+", default=list(UNITS), choices=list(UNITS))
    parser.add_argument("--parts", nargs="+", default=["product", "work", "accuracy"])
    parser.add_argument("--shared", action="store_true", help="note that others used the machine")
    options = parser.parse_args()
    result: dict[str, Any] = {
        "model": "Llama 110M, fp32; accuracy on base/model",
        "rounds": options.rounds,
        "shared_machine": options.shared,
        "load_average": os.getloadavg(),
    }
    if "accuracy" in options.parts:
        result["accuracy"] = accuracy()
    if "product" in options.parts:
        result["product"] = products(options.rounds)
    if "work" in options.parts:
        model = make_model("llama-110m", LLAMA_110M)
        result["work"] = work(model, options.modes, options.units, options.rounds)
    save("privacy", result)


if __name__ == "__main__":
    main()
