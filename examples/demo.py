"""The main job on real processes: one executor, four fine-tuning clients, one inference client.

``make demo`` runs it on the base model in ``base/model``. Four adapters of four kinds train on
four tasks while a fifth client streams text, all against one copy of the weights. A live table
shows them; at the end come the figures, samples from before and after, and the proof that the
adapters work in plain peft without us. Everything it writes goes to ``demo-out/``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "base" / "model"
OUT = ROOT / "demo-out"
SYMBIOSIS = [sys.executable, "-m", "symbiosis.cli.main"]
PROMPT = "def read_lines(path):\n"
console = Console()


class Job(NamedTuple):
    """One fine-tuning client of the demo."""

    task: str
    method: str
    learning_rate: float
    options: tuple[str, ...]

    @property
    def out(self) -> Path:
        return OUT / f"{self.task}-{self.method}"

    @property
    def data(self) -> Path:
        return OUT / "data" / f"{self.task}.jsonl"

    @property
    def held_out(self) -> Path:
        return OUT / "data" / f"{self.task}-held-out.jsonl"


JOBS = (
    Job("sql", "lora", 3e-3, ("r=8",)),
    Job("log", "ia3", 2e-1, ()),
    Job("json", "prefix", 2e-1, ("num_virtual_tokens=20",)),
    Job("unittest", "p-tuning", 1e-2, ("num_virtual_tokens=20",)),
)
STEPS = 32
BATCH = 8


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    (OUT / "data").mkdir(parents=True)
    started_s = time.monotonic()
    make_data()
    with ExitStack() as running:
        url = running.enter_context(served())
        clients = {job.task: finetuning(job, url) for job in JOBS}
        stream = OUT / "stream.txt"
        clients["stream"] = generating(url, stream)
        peak = watch(url, clients, stream)
        console.print(results(), shared_memory(peak))
        show_samples(url)
    separate = separate_copies()
    console.print(
        f"\n[bold]Memory[/] (proportional set size of all processes, measured at its peak): "
        f"executor and five clients [bold]{peak / 2**20:.0f} MiB[/], five separate processes "
        f"[bold]{separate / 2**20:.0f} MiB[/].\nThis base is so small (22 MB) that Python and "
        f"torch outweigh it, and separate processes share the mapped file; see the README."
    )
    console.print(f"\nDone in {time.monotonic() - started_s:.0f} s. Adapters are in {OUT.name}/.")


def make_data() -> None:
    """Training and held-out examples from different seeds, which share no prompt."""
    for job in JOBS:
        for path, count, seed in ((job.data, 480, 0), (job.held_out, 48, 1)):
            generator = [sys.executable, str(ROOT / "base" / "tasks.py"), "--task", job.task]
            options = ["--count", str(count), "--seed", str(seed), "--out", str(path)]
            subprocess.run(generator + options, check=True, stdout=subprocess.DEVNULL)


@contextmanager
def served() -> Iterator[str]:
    """The executor as a process of its own."""
    url, log = f"unix://{OUT}/base.sock", OUT / "executor.log"
    with log.open("w") as sink:
        command = [*SYMBIOSIS, "serve", str(MODEL), "--dtype", "float32", "--listen", url]
        process = subprocess.Popen(command, stdout=sink, stderr=sink)
    try:
        while "ready" not in log.read_text():
            if process.poll() is not None:
                sys.exit(f"the executor did not start:\n{log.read_text()}")
            time.sleep(0.1)
        console.print(Text(log.read_text().strip(), style="dim"))
        yield url
    finally:
        process.terminate()
        process.wait(30)


def finetuning(job: Job, url: str) -> subprocess.Popen[bytes]:
    """``symbiosis finetune`` as a process of its own."""
    command = [
        *(*SYMBIOSIS, "finetune", "--base", url, "--name", f"{job.task}: {job.method}"),
        *("--data", str(job.data), "--eval-data", str(job.held_out), "--out", str(job.out)),
        *("--peft", job.method, *(part for o in job.options for part in ("--set", o))),
        *("--steps", str(STEPS), "--batch-size", str(BATCH), "--save-steps", "0"),
        *("--learning-rate", str(job.learning_rate), "--scheduler", "constant", "--threads", "1"),
    ]
    with (OUT / f"{job.task}.log").open("w") as sink:
        return subprocess.Popen(command, stdout=sink, stderr=sink)


def generating(url: str, stream: Path) -> subprocess.Popen[bytes]:
    """``symbiosis generate`` as a process of its own, streaming into a file."""
    command = [
        *(*SYMBIOSIS, "generate", "--base", url, "--name", "stream: no adapter"),
        *("--prompt", PROMPT, "--max-new-tokens", "300", "--temperature", "0.8"),
        *("--threads", "1"),
    ]
    with stream.open("w") as sink, (OUT / "stream.log").open("w") as errors:
        return subprocess.Popen(command, stdout=sink, stderr=errors)


def watch(url: str, clients: dict[str, subprocess.Popen[bytes]], stream: Path) -> int:
    """The live table until all have finished; the peak of memory over all processes."""
    import symbiosis

    peak = 0
    with symbiosis.connect(url, name="this table") as base, Live(console=console) as live:
        while any(process.poll() is None for process in clients.values()):
            stats = base.executor_stats()
            peak = max(peak, pss_bytes([stats["pid"], *(p.pid for p in clients.values())]))
            live.update(Group(live_table(stats), stream_panel(stream)))
            time.sleep(0.5)
    for name, process in clients.items():
        if process.returncode:
            sys.exit(f"{name} failed:\n{(OUT / f'{name}.log').read_text()[-2000:]}")
    return peak


def live_table(stats: dict[str, Any]) -> Table:
    batches = {int(size): n for size, n in stats["batch_sizes"].items()}
    mean = sum(s * n for s, n in batches.items()) / max(1, sum(batches.values()))
    table = Table(
        title=f"{stats['exchanges_per_s']:.0f} exchanges/s, mean batch {mean:.2f}, "
        f"executor {stats['memory_bytes'] / 2**20:.0f} MiB"
    )
    for column in ("client", "step", "loss", "tokens/s", "exchanges", "batch", "queue ms"):
        table.add_column(column, justify="left" if column == "client" else "right")
    for client in sorted(stats["clients"].values(), key=lambda c: c["name"]):
        record = last_record(client["name"])
        table.add_row(
            client["name"],
            f"{record['step']}/{record['steps']}" if record else "",
            f"{record['loss']:.3f}" if record and record["loss"] is not None else "",
            f"{record['tokens_per_s']:.0f}" if record else "",
            str(client["exchanges"]),
            f"{client['mean_batch']:.2f}",
            f"{client['mean_queue_ms']:.2f}",
        )
    return table


def last_record(name: str) -> dict[str, Any] | None:
    for job in JOBS:
        if name == f"{job.task}: {job.method}" and (job.out / "progress.jsonl").exists():
            lines = (job.out / "progress.jsonl").read_text().splitlines()
            return json.loads(lines[-1]) if lines else None
    return None


def stream_panel(stream: Path) -> Panel:
    lines = stream.read_text(errors="replace").splitlines()[-5:]
    return Panel("\n".join(lines), title="streaming client", height=7, style="dim")


def results() -> Table:
    table = Table(title="Four adapters, one base")
    for column in ("task", "method", "trainable", "steps", "held-out loss", "tokens/s"):
        table.add_column(column)
    for column in ("exchanges", "mean batch", "peak memory"):
        table.add_column(column, justify="right")
    for job in JOBS:
        run = json.loads((job.out / "run.json").read_text())
        table.add_row(
            job.task,
            run["method"],
            f"{run['trainable_parameters']:,}",
            str(run["steps"]),
            f"{run['loss_before']:.2f} → {run['loss_after']:.2f}",
            f"{run['tokens_per_s']:.0f}",
            f"{run['exchanges']:,}",
            f"{run['mean_batch']:.2f}",
            f"{run['peak_memory_bytes'] / 2**20:.0f} MiB",
        )
    return table


def shared_memory(peak: int) -> str:
    weights = (MODEL / "model.safetensors").stat().st_size * 2  # bfloat16 on disk, float32 served
    return f"One copy of the weights ({weights / 1e6:.0f} MB) served all of them."


def show_samples(url: str) -> None:
    """Each adapter on a held-out prompt: base before, adapter after, and plain peft's verdict."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    import symbiosis

    transformers_logging.disable_progress_bar()
    table = Table(title="Held-out prompts, greedy", show_lines=True)
    for column in ("task", "prompt", "base before", "adapter after", "wanted", "in plain peft"):
        table.add_column(column)
    with symbiosis.connect(url, name="samples") as base:
        tokenizer = base.tokenizer()
        for job in JOBS:
            example = json.loads(job.held_out.read_text().splitlines()[0])
            ids = tokenizer(example["prompt"], return_tensors="pt")
            whole = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
            before = answer(base.model(), ids)
            split = answer(PeftModel.from_pretrained(base.model(), job.out), ids)
            plain = answer(PeftModel.from_pretrained(whole, job.out), ids)
            same = "[green]same tokens[/]" if torch.equal(split, plain) else "[red]DIFFERS[/]"
            prompt_length = ids["input_ids"].shape[1]
            texts = [
                tokenizer.decode(tokens[0, prompt_length:], skip_special_tokens=True)
                for tokens in (before, split)
            ]
            texts = [Text(text.strip().splitlines()[0][:80]) for text in texts]
            wanted = Text(example["completion"].strip().splitlines()[0])
            table.add_row(job.task, Text(example["prompt"].strip()), *texts, wanted, same)
            if not torch.equal(split, plain):
                sys.exit(f"{job.out} gives other tokens in plain peft")
    console.print(table)


def answer(model: Any, ids: Any) -> Any:
    model.eval()
    return model.generate(**ids, max_new_tokens=40, do_sample=False)


def separate_copies() -> int:
    """Peak memory of the same five jobs as processes with a whole model each."""
    script = Path(__file__).with_name("separate_copy.py")
    console.print("\nThe same five jobs as separate processes, to measure their memory ...")
    work = [[job.method, str(job.data), str(job.learning_rate)] for job in JOBS]
    processes, log = [], OUT / "separate.log"
    with log.open("w") as sink:
        for options in (*work, ["none"]):
            command = [sys.executable, str(script), str(MODEL), *options]
            processes.append(subprocess.Popen(command, stdout=sink, stderr=sink))
    peak = 0
    while any(process.poll() is None for process in processes):
        peak = max(peak, pss_bytes([process.pid for process in processes]))
        time.sleep(0.25)
    if any(process.returncode for process in processes):
        sys.exit(f"a separate copy failed:\n{log.read_text()}")
    return peak


def pss_bytes(pids: list[int]) -> int:
    """Proportional set size: pages shared between processes are counted once in all."""
    total = 0
    for pid in pids:
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:  # it has just ended
            continue
        total += sum(
            int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:")
        )
    return total


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # for the processes that it starts
    warnings.simplefilter("ignore")
    main()
