"""Results as lines on the terminal and as the section of docs/compatibility.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Result = dict[str, Any]


def summary(result: Result) -> str:
    """One line for one architecture."""
    if result["not_run"]:
        return f"{result['name']}: not run: {result['not_run'][:200]}"
    parts = [
        f"{name} {check['verdict']}"
        + (f" {check['difference']:.1e}" if check["verdict"] == "differs" else "")
        + (f" [{check['reason'][:200]}]" if check["reason"] else "")
        for name, check in result["checks"].items()
    ]
    return (
        f"{result['name']}: {', '.join(parts)}; {result['naive']}/{result['grouped']} exchanges, "
        f"{result['fetched_bytes']} B fetched, {result['seconds']} s"
    )


def write(path: Path, results: list[Result]) -> None:
    pass
