"""Products of a few rows with one large weight: `F.linear` against the kernel for joined rows.

fp32 on the CPU. The weights are more than the caches hold, and are gone through in turn, as a model
does. Prints microseconds of both, alternated, and their ratio.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from harness import Sample, ratio, save
from symbiosis.executor import few_rows

SHAPES = [(5632, 2048), (2048, 5632), (2048, 2048), (32000, 768)]
ROWS = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]
CACHE_BYTES = 400 << 20


def pass_us(product: Callable[..., torch.Tensor], x: torch.Tensor, ws: list[torch.Tensor]) -> float:
    """Microseconds per product of one pass over all weights."""
    started_s = time.perf_counter()
    for w in ws:
        product(x, w, None)
    return (time.perf_counter() - started_s) / len(ws) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result: dict[str, object] = {"threads": options.threads}
    for out, inner in SHAPES:
        count = max(2, CACHE_BYTES // (out * inner * 4))
        ws = [torch.randn(out, inner) for _ in range(count)]
        for rows in ROWS:
            x = torch.randn(rows, inner)
            ours, theirs = [], []
            for number in range(options.rounds + 1):
                a, b = pass_us(F.linear, x, ws), pass_us(few_rows.linear, x, ws)
                if number:  # the first warms up
                    theirs.append(a)
                    ours.append(b)
            plain, few = Sample(tuple(theirs)), Sample(tuple(ours))
            faster = ratio(plain, few)
            result[f"{out}x{inner}/{rows}"] = {
                "linear_us": plain.median,
                "few_rows_us": few.median,
                "ratio": faster.median,
            }
            print(
                f"{out} × {inner}, {rows:2} rows: linear {plain.spread} µs, few_rows "
                f"{few.spread} µs: {faster.spread} times as fast",
                flush=True,
            )
    save("few-rows", result)


if __name__ == "__main__":
    main()
