"""1, 4 and 16 decoding clients of one executor against as many separate processes.

The clients hold different adapters (LoRA of two ranks, IA3, prefix tuning) and decode greedily
at their own pace. Peer: the same code with the whole model in each process, as many of them or,
with ``--separate``, no more than fit the machine. Speed is tokens/s over all; memory is the peak of
the proportional set size over all processes, executor included.
"""

from __future__ import annotations

import argparse
import functools
import os
from typing import Any

from harness import Sample, Worker, chosen_model, executor, model_options, peak_pss, save

_FITS = 6 << 30  # bytes of peers that leave room for the other side

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


class Side:
    """Decoders of one side, and what they have shown."""

    def __init__(self, source: str, pids: list[int], count: int) -> None:
        self._pids = pids
        self._workers = decoders(source, count, max(1, (os.cpu_count() or 1) // count))
        self._rates: list[float] = []
        self.peak = 0
        self.mean_batch = 0.0  # of its exchanges, once it is closed

    def run(self, tokens: int) -> None:
        rate, peak = run_decoders(self._workers, self._pids, tokens)
        self._rates.append(rate)
        self.peak = max(self.peak, peak)

    @property
    def tokens_per_s(self) -> Sample:
        """Without the first round, which warms up."""
        return Sample(tuple(self._rates[1:]))

    def close(self) -> None:
        batches = [worker.run(do="stats").get("mean_batch", 0.0) for worker in self._workers]
        for worker in self._workers:
            worker.close()
        self.mean_batch = sum(batches) / len(batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--separate", type=int, default=1 << 30, help="the most peers that fit")
    model_options(parser)
    options = parser.parse_args()
    model, title, suffix, serve = chosen_model(options)
    size = 2 * sum(file.stat().st_size for file in model.glob("*.safetensors"))  # bf16 to fp32
    apart = options.from_bf16 or options.lend  # else both would map one file, and share its pages
    result: dict[str, Any] = {"model": title, "methods": METHODS}
    for count in options.clients:
        peers = min(count, options.separate)
        sides: dict[str, Side] = {}
        with executor(model, *serve) as served:
            make = {
                "theirs": functools.partial(Side, str(model), [], peers),
                "ours": functools.partial(Side, served.unix, [served.pid], count),
            }
            in_turn = apart and peers * size <= _FITS
            for names in [["theirs", "ours"]] if in_turn else [["theirs"], ["ours"]]:
                running = {name: make[name]() for name in names}
                for _ in range(options.rounds + 1):
                    for side in running.values():
                        side.run(options.tokens)
                for side in running.values():
                    side.close()
                sides.update(running)
        ours, theirs = sides["ours"], sides["theirs"]
        our, their = ours.tokens_per_s, theirs.tokens_per_s
        result[str(count)] = {
            "split_tokens_per_s": our.median,
            "separate": peers,
            "separate_tokens_per_s": their.median,
            "speed_ratio": our.median / their.median,
            "speed_spread": f"{our.spread} against {their.spread}",
            "split_bytes": ours.peak,
            "separate_bytes": theirs.peak,
            "memory_ratio": theirs.peak / ours.peak,
            "mean_batch": ours.mean_batch,
        }
        print(
            f"{count} decoders: split {our.spread} tokens/s in {ours.peak / 2**20:.0f} MiB (mean "
            f"batch {ours.mean_batch:.2f}), {peers} separate {their.spread} in "
            f"{theirs.peak / 2**20:.0f} MiB: speed × {our.median / their.median:.2f}, "
            f"memory ÷ {theirs.peak / ours.peak:.2f}",
            flush=True,
        )
        save("decoding" + suffix, result)


if __name__ == "__main__":
    main()
