"""How many fine-tuning jobs fit into a given memory: one executor's clients, or separate ones.

Each job trains its own LoRA (r = 16, all linear layers) with AdamW and gradient checkpointing. Peak
memory of one and of two jobs says what is fixed and what a job takes; the number that should fit
is then run, at once, for one step each, and its peak measured. Peer: the same code with the
whole model in each process. Memory is the proportional set size of all processes. ``--malloc`` puts
another allocator under all of them (decision 19).

The limit: (budget - base) / job against budget / (base + job).
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from finetuning import jobs, run_jobs
from harness import chosen_model, executor, model_options, save


def measure(
    source: str, pids: list[int], count: int, batch: int, context: int
) -> tuple[float, int]:
    """``count`` jobs at once, one step each: total tokens/s, and peak memory."""
    threads = max(1, (os.cpu_count() or 1) // count)
    workers = jobs(source, count, threads, checkpointing=True)
    try:
        return run_jobs(workers, pids, steps=1, batch=batch, context=context)
    finally:
        for worker in workers:
            worker.close()


def fit(source: str, pids: list[int], budget: int, batch: int, context: int) -> dict[str, Any]:
    """One and two jobs, then as many as should fit."""
    _, one = measure(source, pids, 1, batch, context)
    _, two = measure(source, pids, 2, batch, context)
    job = max(1, two - one)
    count = max(1, int((budget - (one - job)) // job))
    rate, peak = measure(source, pids, count, batch, context)
    while peak > budget and count > 1:  # the line was too steep
        count -= 1
        rate, peak = measure(source, pids, count, batch, context)
    fixed = one - job
    return {"jobs": count, "bytes": peak, "job": job, "fixed": fixed, "tokens_per_s": rate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget-gib", type=float, default=20.0)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--malloc", type=Path, help="a shared library for LD_PRELOAD")
    model_options(parser)
    options = parser.parse_args()
    malloc = "glibc"
    if options.malloc:
        os.environ["LD_PRELOAD"] = str(options.malloc.resolve(strict=True))
        malloc = options.malloc.name.removeprefix("lib").split(".")[0]
    budget = int(options.budget_gib * 2**30)
    model, title, suffix, serve = chosen_model(options)
    shape = options.batch, options.context
    theirs = fit(str(model), [], budget, *shape)
    with executor(model, *serve) as served:
        ours = fit(served.unix, [served.pid], budget, *shape)
        rate, _ = measure(served.unix, [served.pid], theirs["jobs"], *shape)
    for name, side in (("separate", theirs), ("split", ours)):
        print(
            f"{name}: {side['jobs']} jobs in {side['bytes'] / 2**30:.2f} GiB "
            f"({side['fixed'] / 2**30:.2f} fixed, {side['job'] / 2**30:.2f} a job), "
            f"{side['tokens_per_s']:.1f} tokens/s"
        )
    print(
        f"{title}, {malloc}, {options.batch} × {options.context} tokens, {options.budget_gib} GiB: "
        f"× {ours['jobs'] / theirs['jobs']:.2f} jobs; with {theirs['jobs']} jobs, speed × "
        f"{rate / theirs['tokens_per_s']:.2f}"
    )
    save(
        f"adapters{suffix}-{malloc}",
        {
            "model": title,
            "malloc": malloc,
            "budget_bytes": budget,
            "tokens": shape,
            "separate": theirs,
            "split": ours,
            "jobs_ratio": ours["jobs"] / theirs["jobs"],
            "speed_ratio_at_their_most": rate / theirs["tokens_per_s"],
        },
    )


if __name__ == "__main__":
    main()
