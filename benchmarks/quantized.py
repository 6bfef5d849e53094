"""A quantised base against the dense one: memory, error, perplexity, time.

Writes the section "A quantised base" of docs/compatibility.md. The base model of this project is
judged by text that it has not seen; its size says little of memory and time, which a Llama of 110
million random parameters shows.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, PreTrainedModel

import symbiosis
from harness import LLAMA_110M, ROOT, Sample, executor, make_model, pss_bytes, save

SCHEMES = ("none", "int8", "nf4")
BEGIN, END = "<!-- quantized -->", "<!-- /quantized -->"
PAGE = ROOT / "docs" / "compatibility.md"
Row = dict[str, Any]


def held_out_text(tokenizer: Any, rows: int, length: int) -> torch.Tensor:
    """Windows (rows, length) of the files that the base model was not trained on, spread evenly."""
    sys.path.insert(0, str(ROOT / "base"))
    import train

    documents = train.standard_library(Path(sysconfig.get_paths()["stdlib"]))
    held_out = [document for document in documents if document.held_out]
    windows = torch.cat(train.encode(tokenizer, held_out)).unfold(0, length, length)
    return windows[torch.linspace(0, len(windows) - 1, rows).long()].long()


def random_tokens(rows: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, LLAMA_110M["vocab_size"], (rows, length), generator=generator)


@torch.no_grad()
def logits_of(model: PreTrainedModel, text: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(row[None]).logits for row in text])


def perplexity(logits: torch.Tensor, text: torch.Tensor) -> float:
    """Of the text (rows, length) by its logits (rows, length, vocabulary)."""
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten()).exp())


@torch.no_grad()
def decode(model: PreTrainedModel, tokens: int = 12) -> float:
    """Milliseconds for a token, alone, after a prompt of 32."""
    out = model(random_tokens(1, 32) % model.config.vocab_size, use_cache=True)
    started_s = time.perf_counter()
    for _ in range(tokens):
        token = out.logits[:, -1:].argmax(-1)
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
    return (time.perf_counter() - started_s) / tokens * 1e3


def training_step(model: PreTrainedModel) -> Callable[[], float]:
    """Milliseconds for a LoRA step on 4 rows of 64 tokens."""
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear")).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], 1e-4)
    ids = random_tokens(4, 64) % model.config.vocab_size

    def step() -> float:
        started_s = time.perf_counter()
        adapted(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return (time.perf_counter() - started_s) * 1e3

    return step


def alternated(runs: list[Callable[[], float]], rounds: int) -> list[float]:
    """The median of each, taken in turns, so that all meet the same load of the machine."""
    for run in runs:
        run()
    values = [[run() for run in runs] for _ in range(rounds)]
    return [Sample(column).median for column in zip(*values, strict=True)]


def judge(model: PreTrainedModel, text: torch.Tensor, dense: torch.Tensor | None) -> Row:
    """Errors against the logits of the dense base; its own have none."""
    logits = logits_of(model, text)
    dense = logits if dense is None else dense
    error = (logits - dense).abs()
    return {
        "largest_error": float(error.max()),
        "mean_error": float(error.mean()),
        "logits_std": float(dense.std()),
        "same_token": float((logits.argmax(-1) == dense.argmax(-1)).float().mean()),
        "perplexity": perplexity(logits, text),
    }


def measure(folder: Path, text: torch.Tensor, rounds: int) -> list[Row]:
    """A row for each scheme, each with an executor of its own."""
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        models = []
        for scheme in SCHEMES:
            options = ("--dtype", "float32", "--threads", "1", "--quantize", scheme)
            served = stack.enter_context(executor(folder, *options))
            base = stack.enter_context(symbiosis.connect(served.unix))
            models.append(base.model())
            dense = logits_of(models[0], text) if len(models) > 1 else None
            row = {"scheme": scheme, "bytes": base.welcome["bytes"]}
            rows.append({**row, **judge(models[-1], text, dense), "pss": pss_bytes([served.pid])})
        tokens = alternated([functools.partial(decode, model) for model in models], rounds)
        steps = alternated([training_step(model) for model in models], rounds)
    for row, per_token, per_step in zip(rows, tokens, steps, strict=True):
        row |= {"ms_per_token": per_token, "ms_per_step": per_step}
        print(row)
    return rows


def table(rows: list[Row], *, trained: bool) -> list[str]:
    lines = [
        "| base | hosted weights | executor's memory | logits: mean error | largest | same most "
        "likely token | perplexity | ms per token | ms per LoRA step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = "float32" if row["scheme"] == "none" else f"`--quantize {row['scheme']}`"
        judged = f"{row['perplexity']:.2f}" if trained else "–"
        ratio = row["bytes"] / rows[0]["bytes"]
        lines.append(
            f"| {name} | {row['bytes'] / 1e6:.1f} MB ({ratio:.2f}) | {row['pss'] / 1e6:.0f} MB | "
            f"{row['mean_error']:.4f} | {row['largest_error']:.3f} | {row['same_token']:.1%} | "
            f"{judged} | {time_of('ms_per_token', row, rows)} | "
            f"{time_of('ms_per_step', row, rows)} |"
        )
    return lines


def time_of(what: str, row: Row, rows: list[Row]) -> str:
    """Milliseconds, and how often the dense base's."""
    return f"{row[what]:.0f} (× {row[what] / rows[0][what]:.2f})"


def section(result: dict[str, Any]) -> str:
    ours, large = result["base/model"], result["llama-110m"]
    lines = [
        BEGIN,
        "## A quantised base",
        "",
        f"Generated by `benchmarks/quantized.py` with torch {torch.__version__} on a CPU, one "
        "thread on either side; times are medians of alternated runs on a machine with other "
        "load, so that only their ratios mean something. `int8`: one byte for each number and a "
        "scale for each output; `nf4`: QLoRA's four bits in blocks of 64. Both are torchao's. The "
        "matrices of linear layers are quantised; embeddings, an output head, convolutions, "
        "experts that are one tensor, and matrices that do not fit stay dense. Forward and input "
        "gradient use one and the same matrix, which is unpacked for each exchange: an adapter "
        "trained on a quantised base is, bit for bit, the adapter that plain peft trains on a "
        "local model with the unpacked numbers (tests/executor/test_quantized.py). On CUDA the "
        "same code has not been run; bitsandbytes is not used; files that are quantised already "
        "are refused.",
        "",
        f"The base model of this project on {result['windows']} tokens that it was not trained "
        f"on; the standard deviation of its logits is {ours[0]['logits_std']:.2f}:",
        "",
        *table(ours, trained=True),
        "",
        "A Llama of 110 million random parameters, tied embeddings (98 MB of it, dense), on "
        f"random tokens; the standard deviation of its logits is {large[0]['logits_std']:.2f}:",
        "",
        *table(large, trained=False),
        "",
        "*executor's memory* is the whole process (PSS), of which Python and its libraries take "
        "about 0.3 GB. Quantisation saves memory, not time: every exchange unpacks its matrix, "
        "which a token alone pays in full, and most for four bits; many rows share it.",
        END,
    ]
    return "\n".join(lines)


def write(text: str) -> None:
    """Replace the section in the page, or add it at the end."""
    page = PAGE.read_text() if PAGE.exists() else "# Compatibility\n"
    if BEGIN in page:
        before, rest = page.split(BEGIN)
        page = before + text + rest.split(END)[1]
    else:
        page = f"{page.rstrip()}\n\n{text}\n"
    PAGE.write_text(page)
    print(f"→ {PAGE.relative_to(ROOT)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=32, help="held-out windows of 256 tokens")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = ROOT / "base" / "model"
    text = held_out_text(AutoTokenizer.from_pretrained(folder), options.rows, 256)
    result = {
        "windows": text.numel(),
        "base/model": measure(folder, text, options.rounds),
        "llama-110m": measure(
            make_model("llama-110m", LLAMA_110M), random_tokens(4, 64), options.rounds
        ),
    }
    save("quantized", result)
    write(section(result))


if __name__ == "__main__":
    main()
