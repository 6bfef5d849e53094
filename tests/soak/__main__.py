"""``make soak``: minutes by default, hours if asked for. Ends with a report; exit code 1 if
anything was not as it must be."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

TESTS = str(Path(__file__).resolve().parent.parent)
sys.path.insert(0, TESTS)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (TESTS, os.environ.get("PYTHONPATH"))))
os.environ["OMP_NUM_THREADS"] = "1"  # bits can depend on it


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--hours", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--p99-ms", type=float, default=2000.0, help="bound for one product")
    options = parser.parse_args()

    from soak.run import Soak

    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), options.seed, sys.stderr)
        report = soak.run(60 * options.minutes + 3600 * options.hours, cycle_s=20.0)
    p99_ms = 1e3 * report.percentile_s(0.99)
    if p99_ms > options.p99_ms:
        report.violations.append(f"p99 is {p99_ms:.0f} ms; the bound is {options.p99_ms:g}")
    print(report)
    return bool(report.violations)


if __name__ == "__main__":
    sys.exit(main())
