"""Help, errors and rendering."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from rich.console import Console

from command_line import Outcome, Served, finish, start
from symbiosis.cli import console, serve, status
from symbiosis.cli.progress import progress_of
from symbiosis.executor.executor import FetchPolicy
from symbiosis.executor.quantized import Scheme
from symbiosis.executor.scheduler import POLICIES
from symbiosis.jobs.record import Progress
from symbiosis.transport.addresses import Address

Call = Callable[..., Outcome]

COMMANDS = ("serve", "finetune", "generate", "status")


def test_the_command_line_comes_up_without_torch() -> None:
    code = "import sys, symbiosis.cli.main as m; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(call: Call, command: str) -> None:
    found = call(command, "--help")
    assert found.code == 0
    assert "Examples" in found.out
    assert f"symbiosis {command}" in found.out


def test_overview_and_version(call: Call) -> None:
    overview = call("--help")
    assert all(command in overview.out for command in COMMANDS)
    assert "SYMBIOSIS_BASE" in overview.out
    assert re.fullmatch(r"symbiosis \d+\.\d+\.\d+\n", call("--version").out)


def test_choices_are_those_of_the_library() -> None:
    assert [policy.value for policy in serve.Policy] == list(POLICIES)
    assert [fetch.value for fetch in serve.Fetch] == list(get_args(FetchPolicy))
    assert [scheme.value for scheme in serve.Quantize] == ["none", *get_args(Scheme)]
    assert Address.parse(serve.DEFAULT_URL) == Address.parse("tcp://127.0.0.1")


def finetune_args(base: str, data: Path, out: Path) -> tuple[object, ...]:
    return ("finetune", "--base", base, "--data", data, "--out", out, "--steps", 1)


def test_errors_of_real_processes(
    served: Served, model_folder: Path, train_file: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": "fine"}\n{"text": }\n')
    processes = [
        start(*finetune_args(served.unix, bad, tmp_path / "out")),
        start("serve", model_folder, "--listen", served.tcp),
    ]
    bad_line, port_in_use = map(finish, processes)
    assert bad_line.error.startswith(f"{bad}:3: not JSON: ")
    assert '{"prompt": "...", "completion": "..."}' in bad_line.error
    assert port_in_use.error.startswith(f"cannot listen on {served.tcp}: Address already in use")
    assert not (tmp_path / "out").exists()


def test_errors_of_finetune(call: Call, served: Served, train_file: Path, tmp_path: Path) -> None:
    args = finetune_args(served.unix, train_file, tmp_path / "out")
    assert "no PEFT method 'lorra'. Did you mean lora?" in call(*args, "--peft", "lorra").error
    assert "Did you mean lora_alpha" in call(*args, "--set", "lora_alfa=3").error
    assert "write key=value" in call(*args, "--set", "r").error
    assert "cannot read the options file" in call(*args, "--config", tmp_path / "none").error
    assert "hosts" in call(*args, "--expect-model", "gpt2").error
    nobody = f"unix://{tmp_path}/nobody.sock"
    error = call(*finetune_args(nobody, train_file, tmp_path / "out")).error
    assert error.startswith(f"no executor answers at {nobody}")
    assert "no address" in call(*finetune_args("http://x", train_file, tmp_path / "out")).error
    assert call(*args, "--batch-size", 0).code == 2
    assert "batch_size is 0" in call(*args, "--batch-size", 0).err
    assert call(*args, "--resume", "--overwrite").code == 2
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    assert "is a file" in call(*finetune_args(served.unix, train_file, tmp_path / "file")).error
    inside = finetune_args(served.unix, train_file, tmp_path / "file" / "out")
    assert "Not a directory" in call(*inside).error


def test_errors_of_generate(call: Call, served: Served, train_file: Path, tmp_path: Path) -> None:
    args = ("generate", "--base", served.unix, "--prompt", "the cat", "--max-new-tokens", 2)
    assert "holds no adapter" in call(*args, "--adapter", tmp_path).error
    mixed = call(*args, "--greedy", "--top-k", 3)
    assert mixed.code == 2
    assert "--greedy takes no top_k" in mixed.err
    assert call(*args, "--temperature", 0).code == 2

    adapter = tmp_path / "adapter"
    assert call(*finetune_args(served.unix, train_file, adapter), "--peft", "ia3").code == 0
    both = call(*args, "--adapter", adapter, "--prompt", "a dog")
    assert re.fullmatch(r"(?s)--- adapter, prompt 1\n.*\n--- adapter, prompt 2\n.*\n", both.out)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["target_modules"] = ["nothing_like_it"]
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    assert "does not fit" in call(*args, "--adapter", adapter).error


def test_a_prompt_from_stdin(
    call: Call, served: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "prompt").write_text("the cat\n")
    args = ("generate", "--max-new-tokens", 4, "--prompt")
    monkeypatch.setenv("SYMBIOSIS_BASE", served.tcp)
    with (tmp_path / "prompt").open() as opened:
        monkeypatch.setattr(sys, "stdin", opened)
        piped = call(*args, "-")
    assert piped.code == 0
    assert piped.out == call(*args, "the cat").out


def test_errors_of_serve(
    call: Call, served: Served, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = ("--listen", f"unix://{tmp_path}/free.sock")
    assert "cannot host" in call("serve", tmp_path, *free).error
    assert not list(tmp_path.iterdir()), "the probe of the address is cleaned up"
    assert "it is in use" in call("serve", model_folder, "--listen", served.unix).error
    for url in ("tcp://0.0.0.0:0", "tcp://[::]:0", "tcp://192.0.2.1:7420"):
        assert "--allow-remote" in call("serve", model_folder, "--listen", url).error
    assert "CUDA" in call("serve", model_folder, *free, "--device", "cuda").error
    assert "use cpu or cuda" in call("serve", model_folder, *free, "--device", "abacus").error
    both = ("--device", "cuda", "--lend", "--supervise")
    assert "borrowers" in call("serve", model_folder, *free, *both).err
    assert call("serve", model_folder, *free, "--policy", "rude").code == 2
    assert call("serve", model_folder, *free, "--training-share", 1).code == 2
    broken = tmp_path / "broken"
    shutil.copytree(model_folder, broken)
    (broken / "model.safetensors").write_bytes(b"broken")
    assert "cannot host" in call("serve", broken, *free).error


def test_status(
    call: Call, served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = call("status", "--base", served.tcp, "--once")
    assert "LlamaForCausalLM" in shown.out
    assert "exchanges/s" in shown.out
    assert "no clients" in shown.out
    assert "no executor answers" in call("status", "--base", f"unix://{tmp_path}/x.sock").error

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)
    assert call("status", "--base", served.tcp).code == 130


def test_the_table_has_a_row_per_client() -> None:
    client = {
        "name": "finetune a", "transport": "unix", "pid": 3, "exchanges": 1234, "rows": 5_000_000,
        "mean_batch": 1.5, "mean_queue_ms": 0.25, "compute_s": 2.0, "bytes_in": 3e6,
        "bytes_out": 4e9, "refused": 0, "fetches": 0, "lent": False,
    }  # fmt: skip
    stats = {
        "model": "m", "architecture": "A", "parameters": 7e9, "dtype": "float32", "device": "cpu",
        "policy": "greedy", "uptime_s": 3723.0, "exchanges_per_s": 12.5, "rows_per_s": 100.0,
        "exchanges": 1234, "batch_sizes": {"1": 6, "3": 2}, "waiting": 0, "memory_bytes": 2e9,
        "clients": {"1": client, "2": {**client, "fetches": 7}},
    }  # fmt: skip
    terminal = Console(width=120, record=True, file=io.StringIO())
    terminal.print(status.render(stats))
    text = terminal.export_text()
    assert "7.00 billion parameters" in text
    assert "up 1:02:03" in text
    assert "8 batches (mean 1.50, largest 3)" in text
    assert text.count("finetune a") == 2
    assert all(figure in text for figure in ("1,234", "5.00 million", "3.00 MB", "4.00 GB"))
    assert "fetches" in text


def test_progress_in_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """Where there is no terminal: the first, every evaluation and the last."""
    with progress_of("x") as show:
        show(Progress(0, 300, eval_loss=5.0))
        for step in range(1, 301):
            show(Progress(step, 300, loss=4.0, tokens_per_s=1234.0, eta_s=300.0 - step))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "step 0/300: held-out loss 5.0000"
    assert lines[-1].startswith("step 300/300: held-out loss 5.0000, loss 4.0000, 1,234 tokens/s")
    assert len(lines) < 300


def test_progress_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_of("adapter") as show:
        show(Progress(7, 10, loss=4.0, tokens_per_s=1234.0, eta_s=61.0))
    shown = re.sub(r"\x1b\[[0-9?;]*[A-Za-z]", "", capsys.readouterr().err)
    assert "7/10 loss 4.0000, 1,234 tokens/s, 1:01 left" in " ".join(shown.split())


def test_the_environment(call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SYMBIOSIS_LOG", "loud")
    assert call("status", "--base", "tcp://127.0.0.1:1").code == 2
    monkeypatch.setenv("SYMBIOSIS_LOG", "debug")
    with pytest.raises(Exception, match="no executor answers"):
        call("status", "--base", f"unix://{tmp_path}/x.sock")


def test_figures_in_words() -> None:
    assert [console.amount(n) for n in (999, 12345, 1.5e6, 7e9, 2e12)] == [
        "999", "12,345", "1.50 million", "7.00 billion", "2.00 trillion",
    ]  # fmt: skip
    assert [console.size(n) for n in (9, 1e3, 2.5e6, 3e9, 4e12)] == [
        "9 B", "1.00 kB", "2.50 MB", "3.00 GB", "4.00 TB",
    ]  # fmt: skip
    assert [console.duration(n) for n in (0, 59.6, 61, 3723)] == ["0:00", "1:00", "1:01", "1:02:03"]
