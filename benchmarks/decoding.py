"""1, 4 and 16 decoding clients of one executor against as many separate processes.

The clients hold different adapters (LoRA of two ranks, IA3, prefix tuning) and decode greedily
at their own pace. Peer: the same code with the whole model in each process, as many of them or,
with ``--separate``, no more than fit the machine. Speed is tokens/s over all; memory is the peak of
the proportional set size over all processes, executor included.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from harness import Sample, Worker, chosen_model, executor, model_options, peak_pss, save

METHODS = ["lora", "ia3", "prefix", "lora8"]


def run_decoders(workers: list[Worker], pids: list[int], tokens: int) -> tuple[float, int]:
    """All at once: total tokens/s over the time until the last is done, and peak PSS."""
    with peak_pss([*(worker.pid for worker in workers), *pids]) as peak:
        for worker in workers:
            worker.start(do="decode", tokens=tokens, context=32)
        slowest_s = max(worker.finish()["elapsed_s"] for worker in workers)
    return len(workers) * tokens / slowest_s, peak()


def decoders(source: str, count: int, threads: int) -> list[Worker]:
    passive = "://" in source or count > 1
    workers = [Worker(source, threads=threads, passive=passive, seed=i) for i in range(count)]
    for i, worker in enumerate(workers):
        worker.ready().run(do="adapt", method=METHODS[i % len(METHODS)])
    return workers


def one_side(source: str, pids: list[int], count: int, tokens: int, rounds: int) -> Any:
    threads = max(1, (os.cpu_count() or 1) // count)
    workers = decoders(source, count, threads)
    runs = [run_decoders(workers, pids, tokens) for _ in range(rounds + 1)][1:]
    stats = [worker.run(do="stats") for worker in workers]
    for worker in workers:
        worker.close()
    rates = Sample(tuple(rate for rate, _ in runs))
    return rates, max(peak for _, peak in runs), stats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--separate", type=int, default=1 << 30, help="the most peers that fit")
    model_options(parser)
    options = parser.parse_args()
    model, title, suffix, serve = chosen_model(options)
    result: dict[str, Any] = {"model": title, "methods": METHODS}
    for count in options.clients:
        peers = min(count, options.separate)
        theirs, their_peak, _ = one_side(str(model), [], peers, options.tokens, options.rounds)
        with executor(model, *serve) as served:
            ours, our_peak, stats = one_side(
                served.unix, [served.pid], count, options.tokens, options.rounds
            )
        mean_batch = sum(s["mean_batch"] for s in stats) / len(stats)
        result[str(count)] = {
            "split_tokens_per_s": ours.median,
            "separate": peers,
            "separate_tokens_per_s": theirs.median,
            "speed_ratio": ours.median / theirs.median,
            "speed_spread": f"{ours.spread} against {theirs.spread}",
            "split_bytes": our_peak,
            "separate_bytes": their_peak,
            "memory_ratio": their_peak / our_peak,
            "mean_batch": mean_batch,
        }
        print(
            f"{count} decoders: split {ours.spread} tokens/s in {our_peak / 2**20:.0f} MiB (mean "
            f"batch {mean_batch:.2f}), {peers} separate {theirs.spread} in "
            f"{their_peak / 2**20:.0f} MiB: speed × {ours.median / theirs.median:.2f}, "
            f"memory ÷ {their_peak / our_peak:.2f}",
            flush=True,
        )
        save("decoding" + suffix, result)


if __name__ == "__main__":
    main()
