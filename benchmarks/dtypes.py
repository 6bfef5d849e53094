"""What a base from bf16 files is best computed in here: bf16 or float32; and what `fastest` says.

One client against an executor that computes in bf16, and the same against one in float32, which is
the peer, in turn. The client's own part (attention, adapter) is in the executor's dtype, too.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import symbiosis
from harness import Worker, chosen_model, executor, model_options, save
from overhead import UNITS, measure


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
            ours, peer = workers
            row = measure(peer, {"bf16": ours}, unit, options.rounds)["bf16"]
            bf16_rate, float32_rate = row["split_tokens_per_s"], row["whole_tokens_per_s"]
            print(
                f"{name:9} bf16 {bf16_rate:.1f} tokens/s, float32 {float32_rate:.1f}: "
                f"{row['ratio_spread']}",
                flush=True,
            )
            result[name] = {
                "bf16_tokens_per_s": bf16_rate,
                "float32_tokens_per_s": float32_rate,
                "ratio": row["ratio"],
                "ratio_spread": row["ratio_spread"],
            }
        for worker in workers:
            worker.close()
    save("dtypes" + suffix.removesuffix("-bf16"), result)


if __name__ == "__main__":
    main()
