"""What a base from bf16 files is best computed in here: bf16 or float32; and what `fastest` says.

One client against an executor that computes in bf16, and the same against one in float32, which is
the peer, in turn. The client's own part (attention, adapter) is in the executor's dtype, too.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import symbiosis
from harness import Sample, Worker, chosen_model, executor, model_options, ratio, save
from overhead import UNITS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    model_options(parser)
    parser.set_defaults(from_bf16=True)
    options = parser.parse_args()
    threads = os.cpu_count() or 1
    model, _, suffix, serve = chosen_model(options)
    with executor(model, *serve, "--dtype", "fastest") as served:
        with symbiosis.connect(served.unix) as session:
            fastest = session.welcome["dtype"]
        print(f"fastest: {fastest}", flush=True)
    result: dict[str, Any] = {"model": f"Llama {options.model.upper()}", "fastest": fastest}
    with (
        executor(model, *serve, "--dtype", "bfloat16") as bf16,
        executor(model, *serve, "--dtype", "float32") as fp32,
    ):
        workers = [
            Worker(served.unix, threads=threads, passive=True).ready() for served in (bf16, fp32)
        ]
        for name, unit in UNITS.items():
            if name == "training":
                for worker in workers:
                    worker.run(do="adapt", method="lora")
            rates: tuple[list[float], list[float]] = ([], [])
            for _ in range(options.rounds + 2):  # the first two warm up
                for worker, found in zip(workers, rates, strict=True):
                    found.append(worker.run(**unit)["tokens_per_s"])
            a, b = (Sample(tuple(found[2:])) for found in rates)
            against = ratio(a, b)
            print(
                f"{name:9} bf16 {a.median:.1f} tokens/s, float32 {b.median:.1f}: {against.spread}",
                flush=True,
            )
            result[name] = {
                "bf16_tokens_per_s": a.median,
                "float32_tokens_per_s": b.median,
                "ratio": against.median,
                "ratio_spread": against.spread,
            }
        for worker in workers:
            worker.close()
    save("dtypes" + suffix.removesuffix("-bf16"), result)


if __name__ == "__main__":
    main()
