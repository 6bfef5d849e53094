"""One client against the whole model in one process: decode, prefill, LoRA training.

The price of split execution when there is nothing to share, with the executor's exact kernels and
with the fastest. Peer: the same transformers/peft code on the same folder, in one process, with
torch's default threads. Prints tokens/s of both, the ratio of alternated runs, and where a client's
time per exchange goes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from typing import Any

from harness import Sample, Worker, chosen_model, executor, model_options, ratio, save

UNITS: dict[str, dict[str, Any]] = {
    "decode": {"do": "decode", "tokens": 24, "context": 64},
    "prefill": {"do": "prefill", "context": 512},
    "training": {"do": "train", "steps": 1, "batch": 2, "context": 256},
}


def measure(
    whole: Worker, splits: dict[str, Worker], unit: dict[str, Any], rounds: int
) -> dict[str, dict[str, Any]]:
    """Alternate the whole model and the ``splits``; the first two rounds warm up."""
    before: dict[str, Any] = {}
    ours: dict[str, list[float]] = {kernels: [] for kernels in splits}
    theirs = []
    for round_number in range(rounds + 2):
        if round_number == 2:
            before = {kernels: split.run(do="stats") for kernels, split in splits.items()}
        theirs.append(whole.run(**unit)["tokens_per_s"])
        for kernels, split in splits.items():
            ours[kernels].append(split.run(**unit)["tokens_per_s"])
    peer = Sample(tuple(theirs[2:]))
    rows = {}
    for kernels, split in splits.items():
        rates = Sample(tuple(ours[kernels][2:]))
        rows[kernels] = {
            "split_tokens_per_s": rates.median,
            "whole_tokens_per_s": peer.median,
            "ratio": ratio(rates, peer).median,
            "ratio_spread": ratio(rates, peer).spread,
            **breakdown(before[kernels], split.run(do="stats"), rounds),
        }
    return rows


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
    kernels = ["exact", "fastest"]
    with contextlib.ExitStack() as stack:
        served = {
            each: stack.enter_context(executor(model, *serve, "--kernels", each))
            for each in kernels
        }
        for transport in options.transports:
            whole = Worker(str(model), threads=threads, passive=False).ready()
            for name in options.units:
                unit, trains = UNITS[name], name == "training"
                splits = {
                    each: Worker(
                        getattr(served[each], transport),
                        threads=threads,
                        passive=True,
                        trains=trains,
                    ).ready()
                    for each in kernels
                }
                if trains:
                    for worker in (whole, *splits.values()):
                        worker.run(do="adapt", method="lora")
                for each, row in measure(whole, splits, unit, options.rounds).items():
                    which = "" if each == "exact" else f"/{each} kernels"
                    result[f"{transport}/{name}{which}"] = row
                    print(
                        f"{transport:5} {name:9} {each:8} split {row['split_tokens_per_s']:7.1f} "
                        f"tokens/s, whole {row['whole_tokens_per_s']:7.1f}: ratio "
                        f"{row['ratio_spread']}; {row['exchanges_per_unit']:.0f} exchanges of "
                        f"compute {row['compute_us']:.0f} + queue {row['queue_us']:.0f} + client "
                        f"and wire {row['wire_us']:.0f} µs, {row['megabytes_per_unit']:.0f} MB",
                        flush=True,
                    )
                for split in splits.values():
                    split.close()
            whole.close()
    save("overhead" + suffix, result)


if __name__ == "__main__":
    main()
