"""Products of rows with one weight, fp32 on the CPU: torch's kernel against oneDNN's.

The weights are more than the caches hold, and are gone through in turn, as a model does. Prints
microseconds of both, alternated, and their ratio, by rows.
"""

from __future__ import annotations

import argparse
import os
import time

import torch

from harness import Sample, ratio, save
from symbiosis.kernels import MANY_ROWS, ROWS, TORCH, Kernels, Product, Size

SHAPES = [(5632, 2048), (2048, 5632), (2048, 2048), (768, 768), (32000, 768)]
CACHE_BYTES = {False: 400 << 20, True: 100 << 20}  # of many rows, which take long, less

ONEDNN = Kernels(Size(p, large, rows) for p in Product for large in (False, True) for rows in ROWS)


def pass_us(kernels: Kernels, product: Product, x: torch.Tensor, ws: list[torch.Tensor]) -> float:
    """Microseconds per product of one pass over all weights."""
    multiply = kernels.of(product)
    started_s = time.perf_counter()
    for w in ws:
        multiply(x, w, None)
    return (time.perf_counter() - started_s) / len(ws) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result: dict[str, object] = {"threads": options.threads}
    for out, inner in SHAPES:
        for product in Product:
            for rows in sorted({*ROWS, 3, 8, 12, 24, 32}):
                count = max(2, CACHE_BYTES[rows >= MANY_ROWS] // (out * inner * 4))
                ws = [torch.randn(out, inner) for _ in range(count)]
                x = torch.randn(rows, inner if product is Product.LINEAR else out)
                plain, onednn = [], []
                for number in range(options.rounds + 1):
                    a, b = (pass_us(kernels, product, x, ws) for kernels in (TORCH, ONEDNN))
                    if number:  # the first warms up
                        plain.append(a)
                        onednn.append(b)
                theirs, ours = Sample(tuple(plain)), Sample(tuple(onednn))
                faster = ratio(theirs, ours)
                result[f"{product} {out}x{inner}/{rows}"] = {
                    "torch_us": theirs.median,
                    "onednn_us": ours.median,
                    "ratio": faster.median,
                }
                print(
                    f"{product}, {out} × {inner}, {rows:3} rows: torch {theirs.spread} µs, oneDNN "
                    f"{ours.spread}: {faster.spread} times as fast",
                    flush=True,
                )
    save("products", result)


if __name__ == "__main__":
    main()
