"""Writes the measured table of the README from the results of the other benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness import RESULTS, ROOT

SUFFIXES = ("", "-bf16", "-1b", "-1b-bf16")
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def load(name: str) -> dict[str, Any]:
    path = Path(RESULTS / f"{name}.json")
    return json.loads(path.read_text()) if path.exists() else {}


def exactness() -> list[str]:
    found = load("exactness")
    if not found:
        return []
    names = [n for n in found if n not in ("commit", "date", "machine", "model")]
    worst = max(found[name] for name in names)
    return [f"| {', '.join(names)}: largest difference from the whole model | {worst:g} | |"]


def overhead(suffix: str) -> list[str]:
    found = load(f"overhead{suffix}")
    return [
        f"| {found['model']}: one client, {name.replace('/', ', ')} | "
        f"{row['split_tokens_per_s']:.1f} against {row['whole_tokens_per_s']:.1f} tokens/s | "
        f"**{row['ratio']:.2f}** |"
        for name, row in found.items()
        if isinstance(row, dict)
    ]


def shared(name: str, what: str) -> list[str]:
    found = load(name)
    return [
        f"| {found['model']}: {count} {what}{'' if count == '1' else 's'} | "
        f"{row['split_tokens_per_s']:.1f} against {row['separate_tokens_per_s']:.1f} tokens/s; "
        f"{row['split_bytes'] / 2**30:.2f} against {row['separate_bytes'] / 2**30:.2f} GiB | "
        f"speed **× {row['speed_ratio']:.2f}**, memory **÷ {row['memory_ratio']:.2f}** |"
        for count, row in found.items()
        if isinstance(row, dict)
    ]


def main() -> None:
    rows = [
        *exactness(),
        *[row for suffix in SUFFIXES for row in overhead(suffix)],
        *[row for suffix in SUFFIXES for row in shared(f"finetuning{suffix}", "fine-tuning job")],
        *[row for suffix in SUFFIXES for row in shared(f"decoding{suffix}", "decoder")],
    ]
    where = "\n".join(
        f"- {name}: commit {facts['commit']}, {facts['date']}, {facts['machine']}."
        for kind in ("overhead", "finetuning", "decoding")
        for suffix in SUFFIXES
        if (facts := load(name := kind + suffix))
    )
    table = "\n".join(["| | ours against the peer | ratio |", "|---|---|---|", *rows])
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    _, after = rest.split(END)
    readme.write_text(f"{before}{BEGIN}\n{where}\n\n{table}\n{END}{after}")


if __name__ == "__main__":
    main()
