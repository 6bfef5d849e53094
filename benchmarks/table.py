"""Writes the README's short table, and the long one of docs/measured.md, from the other benchmarks'
results."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from harness import RESULTS, ROOT

SUFFIXES = [size + lent for size in ("", "-bf16", "-1b", "-1b-bf16") for lent in ("", "-lent")]
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


Found = dict[str, Any]


def load(name: str) -> Found:
    path = Path(RESULTS / f"{name}.json")
    return json.loads(path.read_text()) if path.exists() else {}


def exactness(found: Found) -> list[str]:
    names = [n for n in found if n not in ("commit", "date", "machine", "model")]
    worst = max(found[name] for name in names)
    return [f"| {', '.join(names)}: largest difference from the whole model | {worst:g} | |"]


def overhead(found: Found) -> list[str]:
    return [
        f"| {found['model']}: one client, {name.replace('/', ', ')} | "
        f"{row['split_tokens_per_s']:.1f} against {row['whole_tokens_per_s']:.1f} tokens/s | "
        f"**{row['ratio']:.2f}** |"
        for name, row in found.items()
        if isinstance(row, dict)
    ]


def against(count: str, row: Found) -> str:
    """Of what number the peers are, where not as many fit."""
    peers = row.get("separate", int(count))
    return "" if peers == int(count) else f", peer: {peers} separate processes"


def shared(found: Found, what: str) -> list[str]:
    return [
        f"| {found['model']}: {count} {what}{'' if count == '1' else 's'}"
        f"{against(count, row)} | "
        f"{row['split_tokens_per_s']:.1f} against {row['separate_tokens_per_s']:.1f} tokens/s; "
        f"{row['split_bytes'] / 2**30:.2f} against {row['separate_bytes'] / 2**30:.2f} GiB | "
        f"speed **× {row['speed_ratio']:.2f}**, memory **÷ {row['memory_ratio']:.2f}** |"
        for count, row in found.items()
        if isinstance(row, dict)
    ]


def adapters(found: Found) -> list[str]:
    ours, theirs = found["split"], found["separate"]
    budget, shape = found["budget_bytes"] / 2**30, " × ".join(map(str, found["tokens"]))
    return [
        f"| {found['model']}: LoRA jobs of {shape} tokens in {budget:.0f} GiB, {found['malloc']} | "
        f"{ours['jobs']} against {theirs['jobs']} jobs; {ours['job'] / 2**30:.1f} GiB a job and "
        f"{ours['fixed'] / 2**30:.1f} once against {theirs['job'] / 2**30:.1f} a job | "
        f"jobs **× {found['jobs_ratio']:.1f}**; with {theirs['jobs']} on either side, speed "
        f"**× {found['speed_ratio_at_their_most']:.2f}** |"
    ]


def adapter_names(found: Found) -> list[str]:
    return [
        f"| {found['model']}: {count} LoRA decoders, {of}, peer: peft's `adapter_names` | "
        f"{row[side]['tokens_per_s']:.1f} against "
        f"{row['adapter_names_tokens_per_s']:.1f} tokens/s; "
        f"{row[side]['bytes'] / 2**30:.2f} against {row['adapter_names_bytes'] / 2**30:.2f} GiB | "
        f"speed **× {row[side]['ratio']:.2f}** |"
        for count, row in found.items()
        if isinstance(row, dict)
        for side, of in (("split", "a client each"), ("one_client", "`batch_lora` in one client"))
    ]


def vllm_cpu(found: Found) -> list[str]:
    return [
        f"| {found['model']}: {count} LoRA decoders, prompts of {found['context']}, {unit}, "
        f"peer: vLLM on the CPU | {each['split_tokens_per_s']:.1f} against "
        f"{each['vllm_tokens_per_s']:.1f} tokens/s | **{each['ratio']:.2f}** |"
        for count, row in found.items()
        if isinstance(row, dict)
        for unit, each in row.items()
    ]


def makers() -> Iterator[tuple[str, Callable[[Found], list[str]]]]:
    """The results that the table is made from, in its order, and what makes their rows."""
    yield "exactness", exactness
    for suffix in SUFFIXES:
        yield f"overhead{suffix}", overhead
    for suffix in SUFFIXES:
        yield f"finetuning{suffix}", partial(shared, what="fine-tuning job")
    for path in sorted(RESULTS.glob("adapters-*.json")):
        yield path.stem, adapters
    for suffix in SUFFIXES:
        yield f"decoding{suffix}", partial(shared, what="decoder")
    for suffix in SUFFIXES:
        for kernels in ("", "-fastest"):
            yield f"adapter-names{suffix}{kernels}", adapter_names
    for suffix in SUFFIXES:
        yield f"vllm-cpu{suffix}", vllm_cpu


class Row(NamedTuple):
    """A row of the short table: results of one benchmark, without and with lent weights."""

    what: str
    peer: str
    results: str  # their name, with the place of "-lent"
    ratios: Callable[[Found], list[float]]
    form: str = ".2f"


def at(*paths: str) -> Callable[[Found], list[float]]:
    """The numbers at ``paths`` into the results, ``16.one_client.ratio``; those that are there."""

    def found(results: Found) -> list[float]:
        numbers = []
        for path in paths:
            value: Any = results
            for step in path.split("."):
                value = value.get(step, {})
            if isinstance(value, (int, float)):
                numbers.append(value)
        return numbers

    return found


_MISSING = "–"

UNITS = ("decode", "prefill", "training")
ONE = at(*(f"unix/{unit}.ratio" for unit in UNITS))
ONE_FASTEST = at(*(f"unix/{unit}/fastest kernels.ratio" for unit in UNITS))

SHORT = (
    Row("one client, 110M: decode, prefill, training", "whole model", "overhead{}", ONE),
    Row("the same with `--kernels fastest`", "whole model", "overhead{}", ONE_FASTEST),
    Row("one client, 1B: decode, prefill, training", "whole model", "overhead-1b{}", ONE),
    Row("the same with `--kernels fastest`", "whole model", "overhead-1b{}", ONE_FASTEST),
    Row(
        "1, 2, 4, 8 fine-tuning jobs, 110M",
        "as many processes",
        "finetuning-bf16{}",
        at(*(f"{count}.speed_ratio" for count in (1, 2, 4, 8))),
    ),
    Row(
        "LoRA jobs of the 1B that fit 19 GiB (tcmalloc)",
        "separate processes that fit",
        "adapters-1b-bf16{}-tcmalloc_minimal",
        at("jobs_ratio"),
        ".1f",
    ),
    Row(
        "1, 4, 16 decoders of four methods, 110M",
        "as many processes",
        "decoding-bf16{}",
        at(*(f"{count}.speed_ratio" for count in (1, 4, 16))),
    ),
    Row(
        "4, 16 decoders of four methods, 1B",
        "the 4 processes that fit",
        "decoding-1b-bf16{}",
        at("4.speed_ratio", "16.speed_ratio"),
    ),
    Row(
        "their memory: peer's over ours",
        "the 4 processes that fit",
        "decoding-1b-bf16{}",
        at("4.memory_ratio", "16.memory_ratio"),
    ),
    Row(
        "4, 16 LoRA decoders in one client (`batch_lora`), 110M",
        "peft's `adapter_names`",
        "adapter-names{}",
        at("4.one_client.ratio", "16.one_client.ratio"),
    ),
    Row(
        "the same with `--kernels fastest`",
        "peft's `adapter_names`",
        "adapter-names{}-fastest",
        at("4.one_client.ratio", "16.one_client.ratio"),
    ),
    Row(
        "the same adapters, decode",
        "vLLM on the CPU",
        "vllm-cpu{}",
        at("4.decode, one client.ratio", "16.decode, one client.ratio"),
    ),
    Row(
        "the same adapters, prompts",
        "vLLM on the CPU",
        "vllm-cpu{}",
        at("4.prefill, one client.ratio", "16.prefill, one client.ratio"),
        ".1f",
    ),
)


def short_table() -> list[str]:
    rows = ["| | peer | by exchanges | lent |", "|---|---|---|---|"]
    for row in SHORT:
        cells = []
        for lent in ("", "-lent"):
            numbers = row.ratios(load(row.results.format(lent)))
            cells.append(", ".join(format(number, row.form) for number in numbers) or _MISSING)
        if set(cells) == {_MISSING}:
            continue
        rows.append(f"| {row.what} | {row.peer} | {cells[0]} | {cells[1]} |")
    return rows


def long_table() -> list[str]:
    rows, where = [], []
    for name, make in makers():
        if found := load(name):
            rows += make(found)
            facts = f"commit {found['commit']}, {found['date']}, {found['machine']}"
            where.append(f"- {name}: {facts}.")
    return ["| | ours against the peer | ratio |", "|---|---|---|", *rows, "", *where]


def write(page: Path, lines: list[str]) -> None:
    """Put ``lines`` in the place of what is between the page's two marks."""
    before, rest = page.read_text().split(BEGIN)
    _, after = rest.split(END)
    page.write_text("\n".join([before + BEGIN, *lines, END + after]))


def main() -> None:
    write(ROOT / "README.md", short_table())
    write(ROOT / "docs" / "measured.md", long_table())


if __name__ == "__main__":
    main()
