"""N fine-tuning clients of one executor against N separate peft processes: memory and speed.

Each job trains its own LoRA (r = 16, all linear layers) with AdamW on batches of 2 × 256 tokens.
Peer: the same code with the whole model in each process. Memory is the peak of the proportional
set size over all processes, executor included. Each side has the threads that suit it: whole
models share the cores between them; a client may use them all, for most of the time it waits.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from harness import Sample, Worker, chosen_model, executor, model_options, peak_pss, save


def run_jobs(
    workers: list[Worker], extra_pids: list[int], steps: int, batch: int = 2, context: int = 256
) -> tuple[float, int]:
    """All jobs at once: total tokens/s over the time until the last is done, and peak PSS."""
    unit = {"do": "train", "steps": steps, "batch": batch, "context": context}
    with peak_pss([*(worker.pid for worker in workers), *extra_pids]) as peak:
        for worker in workers:
            worker.start(**unit)
        slowest_s = max(worker.finish()["elapsed_s"] for worker in workers)
    return len(workers) * steps * batch * context / slowest_s, peak()


def jobs(source: str, count: int, threads: int, checkpointing: bool = False) -> list[Worker]:
    """``count`` workers with an adapter each, ready to train."""
    passive = "://" in source or count > 1
    workers = [
        Worker(source, threads=threads, passive=passive, seed=i, trains=True) for i in range(count)
    ]
    for worker in workers:
        worker.ready().run(do="adapt", method="lora", checkpointing=checkpointing)
    return workers


def compare(
    model: str, url: str, executor_pid: int, count: int, steps: int, rounds: int, lent: bool
) -> Any:
    """Both sides in turn; beyond four jobs one after the other, for both would not fit."""
    sides = {"split": (url, [executor_pid]), "separate": (model, [])}
    at_once = [["split", "separate"]] if count <= 4 else [["split"], ["separate"]]
    cores = os.cpu_count() or 1
    few = max(1, cores // count)  # the products are their own
    threads = {"split": few if lent else cores, "separate": few}
    speed: dict[str, list[float]] = {name: [] for name in sides}
    memory = dict.fromkeys(sides, 0)
    for names in at_once:
        workers = {name: jobs(sides[name][0], count, threads[name]) for name in names}
        for round_number in range(rounds + 1):
            for name in names:
                rate, peak = run_jobs(workers[name], sides[name][1], steps)
                if round_number:  # the first round warms up
                    speed[name].append(rate)
                memory[name] = max(memory[name], peak)
        for group in workers.values():
            for worker in group:
                worker.close()
    ours, theirs = Sample(tuple(speed["split"])), Sample(tuple(speed["separate"]))
    return {
        "split_tokens_per_s": ours.median,
        "separate_tokens_per_s": theirs.median,
        "speed_ratio": ours.median / theirs.median,
        "speed_spread": f"{ours.spread} against {theirs.spread}",
        "split_bytes": memory["split"],
        "separate_bytes": memory["separate"],
        "memory_ratio": memory["separate"] / memory["split"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    model_options(parser)
    options = parser.parse_args()
    model, title, suffix, serve = chosen_model(options)
    result: dict[str, Any] = {"model": title, "steps": options.steps}
    for count in options.clients:
        with executor(model, *serve) as served:
            row = compare(
                str(model),
                served.unix,
                served.pid,
                count,
                options.steps,
                options.rounds,
                options.lend,
            )
        result[str(count)] = row
        print(
            f"{count} jobs: split {row['split_tokens_per_s']:.0f} tokens/s in "
            f"{row['split_bytes'] / 2**20:.0f} MiB, separate {row['separate_tokens_per_s']:.0f} in "
            f"{row['separate_bytes'] / 2**20:.0f} MiB: speed × {row['speed_ratio']:.2f}, "
            f"memory ÷ {row['memory_ratio']:.2f} ({row['speed_spread']})",
            flush=True,
        )
        save("finetuning" + suffix, result)


if __name__ == "__main__":
    main()
