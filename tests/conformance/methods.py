"""Every PEFT method on every model, and the table of ``docs/compatibility.md``.

``python -m tests.conformance.methods [name ...]``; with names, only the methods whose name
contains one of them, and the page is left as it is. Ends with 1 if something that plain peft can do
does not work.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
sys.path.insert(0, str(Path(__file__).parents[1]))  # as pytest does: tests import one another

import torch

from conformance import methods_table
from conformance.methods_lora import LORA_ROWS
from conformance.methods_models import SUBJECTS
from conformance.methods_others import OTHER_ROWS
from conformance.methods_trial import STEPS, Outcome, bench, try_method, try_without_fetch

_FAULTS = ("refused", "fails")


def main(names: list[str]) -> int:
    torch.set_num_threads(1)  # bits depend on it, and tiny products gain nothing from more
    started_s = time.monotonic()
    rows = [row for row in (*LORA_ROWS, *OTHER_ROWS) if _wanted(row.name, names)]
    outcomes: dict[tuple[str, str], Outcome] = {}
    without_fetch: dict[str, str] = {}
    for subject in SUBJECTS.values():
        with bench(subject) as opened:
            for row in rows:
                outcome = try_method(row, opened)
                outcomes[row.name, subject.title] = outcome
                ran = outcome.verdict in ("exact", "differs")
                if ran and row.name not in without_fetch:
                    without_fetch[row.name] = try_without_fetch(row, opened)
                print(_line(outcome), flush=True)
    if names:
        return _code(outcomes)
    print(methods_table.write(rows, outcomes, without_fetch, STEPS))
    print(f"{time.monotonic() - started_s:.0f} s")
    return _code(outcomes)


def _wanted(name: str, names: list[str]) -> bool:
    return not names or any(part.lower() in name.lower() for part in names)


def _line(outcome: Outcome) -> str:
    differences = {stage: f"{size:.0e}" for stage, size in outcome.differences.items()}
    return f"{outcome.model:8} {outcome.row:34} {outcome.verdict} {differences or outcome.detail}"


def _code(outcomes: dict[tuple[str, str], Outcome]) -> int:
    faults = [o for o in outcomes.values() if o.verdict in _FAULTS or o.fetches_later]
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
