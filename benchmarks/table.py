"""Writes the measured table of the README from the results of the other benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness import RESULTS, ROOT

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


def overhead() -> list[str]:
    return [
        f"| one client, {name.replace('/', ', ')} | {row['split_tokens_per_s']:.0f} against "
        f"{row['whole_tokens_per_s']:.0f} tokens/s | **{row['ratio']:.2f}** |"
        for name, row in load("overhead").items()
        if isinstance(row, dict)
    ]


def shared(name: str, what: str) -> list[str]:
    return [
        f"| {count} {what}{'' if count == '1' else 's'} | {row['split_tokens_per_s']:.0f} against "
        f"{row['separate_tokens_per_s']:.0f} tokens/s; {row['split_bytes'] / 2**30:.2f} against "
        f"{row['separate_bytes'] / 2**30:.2f} GiB | speed **× {row['speed_ratio']:.2f}**, memory "
        f"**÷ {row['memory_ratio']:.2f}** |"
        for count, row in load(name).items()
        if isinstance(row, dict)
    ]


def main() -> None:
    rows = [
        *exactness(),
        *overhead(),
        *shared("finetuning", "fine-tuning job"),
        *shared("decoding", "decoder"),
    ]
    facts = load("overhead")
    where = f"Commit {facts['commit']}, {facts['date']}, {facts['machine']}; {facts['model']}."
    table = "\n".join(["| | ours against the peer | ratio |", "|---|---|---|", *rows])
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    _, after = rest.split(END)
    readme.write_text(f"{before}{BEGIN}\n{where}\n\n{table}\n{END}{after}")


if __name__ == "__main__":
    main()
