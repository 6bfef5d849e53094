"""LoRA decoders of one executor against one process that holds all adapters.

Peer: peft's ``adapter_names``, the whole model and every adapter in one process, which decodes one
sequence for each in a single batch, in step. That is what LoRA alone allows; the clients here are
processes of their own, begin and end when they like, and would have any other method as well.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from decoding import run_decoders
from harness import Sample, Served, Worker, chosen_model, executor, model_options, ratio, save


def compare(model: str, served: Served, count: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Alternated; the first round warms up. A step of the one process is a token for each."""
    cores = os.cpu_count() or 1
    together = Worker(model, threads=cores, passive=False).ready()
    together.run(do="adapt_many", method="lora", count=count)
    threads = max(1, cores // count)
    clients = [
        Worker(served.unix, threads=threads, passive=True, seed=seed) for seed in range(count)
    ]
    for client in clients:
        client.ready().run(do="adapt", method="lora")
    theirs, ours = [], []
    for _ in range(rounds + 1):
        theirs.append(run_decoders([together], [], tokens))
        ours.append(run_decoders(clients, [served.pid], tokens))
    for worker in (together, *clients):
        worker.close()
    a = Sample(tuple(rate for rate, _ in ours[1:]))
    b = Sample(tuple(count * steps for steps, _ in theirs[1:]))
    return {
        "split_tokens_per_s": a.median,
        "adapter_names_tokens_per_s": b.median,
        "ratio": ratio(a, b).median,
        "ratio_spread": ratio(a, b).spread,
        "split_bytes": max(peak for _, peak in ours),
        "adapter_names_bytes": max(peak for _, peak in theirs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    model_options(parser)
    options = parser.parse_args()
    model, title, suffix, serve = chosen_model(options)
    result: dict[str, Any] = {"model": title}
    with executor(model, *serve) as served:
        for count in options.clients:
            row = compare(str(model), served, count, options.tokens, options.rounds)
            result[str(count)] = row
            print(
                f"{title}, {count} decoders: split {row['split_tokens_per_s']:.1f} tokens/s in "
                f"{row['split_bytes'] / 2**30:.2f} GiB, adapter_names "
                f"{row['adapter_names_tokens_per_s']:.1f} in "
                f"{row['adapter_names_bytes'] / 2**30:.2f}: × {row['ratio_spread']}",
                flush=True,
            )
    save("adapter-names" + suffix, result)


if __name__ == "__main__":
    main()
