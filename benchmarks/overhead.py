"""One client against the whole model in one process: decode, prefill, LoRA training.

The price of split execution when there is nothing to share. Peer: the same transformers/peft
code on the same folder, in one process, with torch's default threads. Prints tokens/s of both,
the ratio of alternated runs, and where a client's time per exchange goes.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from harness import Sample, Worker, chosen_model, executor, model_options, ratio, save

UNITS: dict[str, dict[str, Any]] = {
    "decode": {"do": "decode", "tokens": 24, "context": 64},
    "prefill": {"do": "prefill", "context": 512},
    "training": {"do": "train", "steps": 1, "batch": 2, "context": 256},
}


def measure(whole: Worker, split: Worker, unit: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Alternate the two; the first two rounds warm up."""
    ours, theirs = [], []
    for round_number in range(rounds + 2):
        if round_number == 2:
            before = split.run(do="stats")
        theirs.append(whole.run(**unit)["tokens_per_s"])
        ours.append(split.run(**unit)["tokens_per_s"])
    after = split.run(do="stats")
    a, b = Sample(tuple(ours[2:])), Sample(tuple(theirs[2:]))
    return {
        "split_tokens_per_s": a.median,
        "whole_tokens_per_s": b.median,
        "ratio": ratio(a, b).median,
        "ratio_spread": ratio(a, b).spread,
        **breakdown(before, after, rounds),
    }


def breakdown(before: dict[str, Any], after: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Microseconds per exchange: in the queue, computing, and the rest (client and wire)."""
    exchanges = max(1, after["exchanges"] - before["exchanges"])
    per = {k: (after[k] - before[k]) / exchanges * 1e6 for k in ("wait_s", "queue_s", "compute_s")}
    return {
        "exchanges_per_unit": exchanges / rounds,
        "compute_us": per["compute_s"],
        "queue_us": per["queue_s"],
        "wire_us": per["wait_s"] - per["queue_s"] - per["compute_s"],
        "megabytes_per_unit": (
            after["bytes_sent"] + after["bytes_received"]
            - before["bytes_sent"] - before["bytes_received"]
        ) / rounds / 1e6,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--units", nargs="+", default=list(UNITS), choices=list(UNITS))
    parser.add_argument("--transports", nargs="+", default=["unix", "tcp"])
    model_options(parser)
    options = parser.parse_args()
    if options.lend:
        options.transports = ["unix"]  # over others nothing is lent
    threads = os.cpu_count() or 1
    model, title, suffix, serve = chosen_model(options)
    result: dict[str, Any] = {"model": title, "rounds": options.rounds}
    with executor(model, *serve) as served:
        for transport in options.transports:
            whole = Worker(str(model), threads=threads, passive=False).ready()
            url = getattr(served, transport)
            for name in options.units:
                unit, trains = UNITS[name], name == "training"
                split = Worker(url, threads=threads, passive=True, trains=trains).ready()
                if trains:
                    for worker in (split, whole):
                        worker.run(do="adapt", method="lora")
                row = measure(whole, split, unit, options.rounds)
                result[f"{transport}/{name}"] = row
                print(
                    f"{transport:5} {name:9} split {row['split_tokens_per_s']:7.1f} tokens/s, "
                    f"whole {row['whole_tokens_per_s']:7.1f}: ratio {row['ratio_spread']}; "
                    f"{row['exchanges_per_unit']:.0f} exchanges of compute {row['compute_us']:.0f} "
                    f"+ queue {row['queue_us']:.0f} + client and wire {row['wire_us']:.0f} µs, "
                    f"{row['megabytes_per_unit']:.0f} MB",
                    flush=True,
                )
                split.close()
            whole.close()
    save("overhead" + suffix, result)


if __name__ == "__main__":
    main()
