"""``python -m tests.conformance [names] [--all]``: the full run, and docs/compatibility.md.

Results of earlier runs in the results folder are kept, unless ``--again`` is given; names run
just those.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from .catalogue import cases
from .report import summary, write
from .sweep import load, sweep

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("names", nargs="*", help="model types or model_type/ClassName; default all")
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "conformance")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--limit", type=float, default=180.0, help="seconds for one architecture")
    parser.add_argument("--resume", action="store_true", help="keep the results that are there")
    parser.add_argument("--trace", action="store_true", help="print the traces of what failed")
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "compatibility.md")
    options = parser.parse_args()
    everything = cases()
    chosen = [
        case
        for case in everything
        if not options.names or {case.name, case.model_type, case.family} & set(options.names)
    ]
    if options.resume:
        done = load(options.results, {case.name for case in chosen})
        chosen = [case for case in chosen if case.name not in done]
    started_s = time.monotonic()
    for result in sweep(chosen, options.results, jobs=options.jobs, limit_s=options.limit):
        print(summary(result), flush=True)
        if options.trace:
            for check in result["checks"].values():
                if check["verdict"] in ("refused", "split fails"):
                    print(check["trace"])
            print(result["trace"])
    took_s = time.monotonic() - started_s
    results = load(options.results, {case.name for case in everything})
    if len(results) == len(everything):
        write(options.document, [results[case.name] for case in everything])
        print(f"wrote {options.document}")
    print(f"{len(chosen)} architectures in {took_s:.0f} s")


main()
