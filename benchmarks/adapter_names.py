"""LoRA decoders of one executor against one process that holds all adapters.

Peer: peft's ``adapter_names``, the whole model and every adapter in one process, which decodes one
sequence for each in a single batch, in step. That is what LoRA alone allows; so ours are, once,
clients that are processes of their own, begin and end when they like and would have any other
method as well, and once a single client that decodes in step too, by `symbiosis.batch_lora`.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from decoding import run_decoders
from harness import (
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


def lora_clients(served: Served, count: int) -> tuple[list[Worker], Worker]:
    """``count`` clients with an adapter each, and one with as many."""
    cores = os.cpu_count() or 1
    threads = max(1, cores // count)
    clients = [
        Worker(served.unix, threads=threads, passive=True, seed=seed) for seed in range(count)
    ]
    for client in clients:
        client.ready().run(do="adapt", method="lora")
    one = Worker(served.unix, threads=cores, passive=True).ready()
    one.run(do="adapt_many", method="lora", count=count, batched=True)
    return clients, one


def compare(model: str, served: Served, count: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Alternated; the first round warms up. A step of the one process is a token for each."""
    together = Worker(model, threads=os.cpu_count() or 1, passive=False).ready()
    together.run(do="adapt_many", method="lora", count=count)
    clients, one = lora_clients(served, count)
    theirs, ours, alone = [], [], []
    for _ in range(rounds + 1):
        theirs.append(run_decoders([together], [], tokens))
        ours.append(run_decoders(clients, [served.pid], tokens))
        settle()
        alone.append(run_decoders([one], [served.pid], tokens))
    for worker in (together, *clients, one):
        worker.close()
    peer = Sample(tuple(count * steps for steps, _ in theirs[1:]))
    found: dict[str, Any] = {
        "adapter_names_tokens_per_s": peer.median,
        "adapter_names_bytes": max(peak for _, peak in theirs),
    }
    for name, runs, each in (("split", ours, 1), ("one_client", alone, count)):
        rates = Sample(tuple(each * rate for rate, _ in runs[1:]))
        found[name] = {
            "tokens_per_s": rates.median,
            "bytes": max(peak for _, peak in runs),
            "ratio": ratio(rates, peer).median,
            "ratio_spread": ratio(rates, peer).spread,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--fastest", action="store_true", help="the executor serves with --kernels fastest"
    )
    model_options(parser)
    options = parser.parse_args()
    model, title, suffix, serve = chosen_model(options)
    if options.fastest:
        title, suffix = f"{title}, fastest kernels", f"{suffix}-fastest"
        serve += ("--kernels", "fastest")
    result: dict[str, Any] = {"model": title}
    with executor(model, *serve) as served:
        for count in options.clients:
            row = compare(str(model), served, count, options.tokens, options.rounds)
            result[str(count)] = row
            for name in ("split", "one_client"):
                found = row[name]
                print(
                    f"{title}, {count} decoders: {name} {found['tokens_per_s']:.1f} tokens/s in "
                    f"{found['bytes'] / 2**30:.2f} GiB, adapter_names "
                    f"{row['adapter_names_tokens_per_s']:.1f} in "
                    f"{row['adapter_names_bytes'] / 2**30:.2f}: × {found['ratio_spread']}",
                    flush=True,
                )
    save("adapter-names" + suffix, result)


if __name__ == "__main__":
    main()
