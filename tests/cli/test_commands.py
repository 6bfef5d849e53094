"""serve → finetune → generate → status, as processes."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import symbiosis
import tiny_files
from command_line import Outcome, Served, finish, run, serve, start
from symbiosis.jobs import finetune
from symbiosis.jobs.record import Progress, RunFolder
from symbiosis.jobs.spec import FinetuneSpec

Call = Callable[..., Outcome]


def test_the_whole_story(
    served: Served, model_folder: Path, train_file: Path, tmp_path: Path, call: Call
) -> None:
    facts = dict(line.split(maxsplit=1) for line in served.lines[1:-1])
    assert facts["model"] == str(model_folder)
    assert facts["architecture"] == "LlamaForCausalLM"
    assert "parameters" in facts["weights"]
    assert facts["weights"].endswith("in float32")
    assert facts["device"] == "cpu"
    assert facts["kernels"] == "exact"
    assert facts["policy"] == "align, training share 0.3, fetch allow"

    config = tmp_path / "peft.yaml"
    config.write_text("r: 2\nlora_alpha: 8\n")
    out = tmp_path / "adapter"
    options = ("--peft", "LoRA", "--config", config, "--set", "r=4", "--set", "lora_dropout=1e-1")
    sizes = ("--steps", 5, "--batch-size", 3, "--learning-rate", 0.01, "--seed", 3)
    trained = run(
        "finetune", "--base", served.unix, "--data", train_file, "--out", out, *options, *sizes,
        "--threads", 1, "--expect-model", model_folder.name,
    )  # fmt: skip
    assert trained.code == 0, trained
    assert "loss on the completion" in trained.err
    assert "step 5/5: held-out loss" in trained.err
    assert "held-out loss" in trained.out
    assert f"adapter in {out}" in trained.out
    report = json.loads((out / "run.json").read_text())
    assert report["options"] == {
        "task_type": "CAUSAL_LM",
        "target_modules": "all-linear",
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
    }
    assert report["steps"] == 5

    prompt = "the cat sat "
    answered = run(
        "generate", "--base", served.tcp, "--adapter", out, "--prompt", prompt,
        "--max-new-tokens", 6, "--threads", 1,
    )  # fmt: skip
    assert answered.code == 0, answered
    assert answered.out == _locally(model_folder, out, prompt) + "\n"
    assert "adapter: " in answered.err
    assert "tokens/s" in answered.err

    stats = json.loads(call("status", "--base", served.unix, "--once", "--json").out)
    assert stats["model"] == str(model_folder)
    assert stats["exchanges"] > report["exchanges"]
    assert stats["clients_seen"] >= 3
    assert stats["clients"] == {}


def _locally(model_folder: Path, adapter: Path, prompt: str) -> str:
    """What plain peft and transformers say."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(model, str(adapter)).eval()
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    found = adapted.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
    )
    return str(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))


def test_ctrl_c_and_resume(served: Served, train_file: Path, tmp_path: Path, call: Call) -> None:
    """A process that a signal ends goes on in another, and the adapter is the same."""
    spec = FinetuneSpec(
        base=served.unix,
        data=train_file,
        out=tmp_path / "whole",
        options={"lora_dropout": 0.1},
        steps=50,
        batch_size=3,
        save_steps=10,
    )
    command = (
        "finetune", "--base", served.unix, "--data", train_file, "--out", tmp_path / "parts",
        "--set", "lora_dropout=0.1", "--steps", 50, "--batch-size", 3, "--save-steps", 10,
        "--threads", 1,
    )  # fmt: skip
    process = start(*command)
    checkpoint = tmp_path / "parts" / "checkpoints" / "checkpoint-10" / "trainer_state.json"
    deadline_s = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline_s:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    interrupted = finish(process)
    assert interrupted.code == 130, interrupted
    assert "--resume" in interrupted.err
    assert "Traceback" not in interrupted.err
    steps_done = len((tmp_path / "parts" / "progress.jsonl").read_text().splitlines())
    assert 10 < steps_done < 50

    again = call(*command)
    assert "already holds a run" in again.error
    resumed = call(*command, "--resume")
    assert resumed.code == 0, resumed
    assert "resuming from step" in resumed.err
    finetune.run(dataclasses.replace(spec))
    first, second = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "parts")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("swallowed", [True, False], ids=["swallowed", "another error"])
def test_an_interrupt_is_not_lost(
    served: Served,
    train_file: Path,
    tmp_path: Path,
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
    swallowed: bool,
) -> None:
    """One that comes within a finaliser is swallowed, within some libraries it is another error."""
    append = RunFolder.append

    def interrupted(self: RunFolder, record: Progress) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt:
            if not swallowed:
                raise RuntimeError("unexpected position in a file") from None
        append(self, record)

    monkeypatch.setattr(RunFolder, "append", interrupted)
    outcome = call(
        "finetune", "--base", served.unix, "--data", train_file, "--out", tmp_path / "out",
        "--steps", 5, "--batch-size", 1,
    )  # fmt: skip
    assert outcome.code == 130, outcome
    assert "--resume" in outcome.err


def test_sigterm_ends_a_server_in_order(model_folder: Path, tmp_path: Path, call: Call) -> None:
    """Exit code 0, the socket file is gone, and a live view of it ends with an error."""
    server = serve(model_folder, tmp_path)
    socket = tmp_path / "base.sock"
    assert socket.is_socket()
    assert socket.stat().st_mode & 0o077 == 0
    watching = start("status", "--base", server.unix, "--json", "--interval", 0.1)
    assert watching.stdout is not None
    assert json.loads(watching.stdout.readline())["pid"] == server.process.pid
    server.process.send_signal(signal.SIGTERM)
    ended = finish(server.process)
    assert ended.code == 0, ended
    assert "Traceback" not in ended.err
    assert not socket.exists()
    assert re.search("shutting down|has gone", finish(watching).error)


def test_the_fastest_kernels(model_folder: Path, tmp_path: Path, call: Call) -> None:
    server = serve(model_folder, tmp_path, "--kernels", "fastest")
    facts = dict(line.split(maxsplit=1) for line in server.lines[1:-1])
    assert facts["kernels"] == "fastest"
    answer = call(
        "generate", "--base", server.unix, "--prompt", "the cat", "--max-new-tokens", 3
    )  # fmt: skip
    assert answer.code == 0, answer
    server.process.terminate()
    finish(server.process)
    assert call("serve", model_folder, "--kernels", "quick").code == 2


def test_a_quantised_base(model_folder: Path, tmp_path: Path, call: Call) -> None:
    """It says so where it starts and in its status, and its libraries do not chatter."""
    server = serve(model_folder, tmp_path, "--quantize", "nf4")
    facts = dict(line.split(maxsplit=1) for line in server.lines[1:-1])
    assert facts["weights"].endswith("in nf4 and float32")
    stats = json.loads(call("status", "--base", server.unix, "--once", "--json").out)
    assert stats["quantization"] == "nf4"
    assert stats["bytes"] < 4 * stats["parameters"] / 2
    assert "in nf4 and float32 on cpu" in call("status", "--base", server.unix, "--once").out
    answer = call(
        "generate", "--base", server.unix, "--prompt", "the cat", "--max-new-tokens", 3
    )  # fmt: skip
    assert answer.code == 0, answer
    server.process.send_signal(signal.SIGTERM)
    ended = finish(server.process)
    assert ended.code == 0
    assert "torchao" not in ended.err + answer.err


def test_a_pinned_model(served: Served, model_folder: Path) -> None:
    """What `digest` prints opens the door; anything else does not."""
    printed = run("digest", model_folder)
    assert re.fullmatch(r"[0-9a-f]{64}\n", printed.out), printed
    asked = ("generate", "--base", served.unix, "--prompt", "the", "--max-new-tokens", 2)
    assert run(*asked, "--expect-digest", printed.out.strip()).code == 0
    refused = run(*asked, "--expect-digest", "0" * 64)
    assert refused.code == 1
    assert printed.out.strip() in refused.err
    assert "Nothing was sent" in refused.err


def test_the_dtype_that_is_fastest_here(tmp_path: Path) -> None:
    """The executor says which, and has the digest of that dtype."""
    folder = tiny_files.build_model(tmp_path / "tiny")
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    served = serve(folder, tmp_path, "--dtype", "fastest")
    try:
        (weights,) = [line for line in served.lines if line.lstrip().startswith("weights")]
        dtype = weights.split()[-1]
        assert dtype in ("bfloat16", "float32")
        with symbiosis.connect(served.unix) as session:
            assert session.digest == run("digest", folder, "--dtype", dtype).out.strip()
            assert session.model().dtype == getattr(torch, dtype)
    finally:
        served.process.send_signal(signal.SIGTERM)
        assert "rows:" in finish(served.process).err
    refused = run("digest", folder, "--dtype", "fastest")
    assert refused.code == 2
    assert "the dtype that it says" in refused.err


def test_a_verified_executor(
    served: Served, model_folder: Path, tmp_path: Path, call: Call
) -> None:
    """Every product is compared with the model that is trusted; that of another is caught."""
    asked = ("generate", "--base", served.unix, "--prompt", "the", "--max-new-tokens", 2)
    right = call(*asked, "--verify", 1, "--verify-weights", model_folder)
    assert right.code == 0, right
    found = re.search(r"verified (\d+) products", right.err)
    assert found is not None, right.err
    assert int(found[1]) > 10

    other = shutil.copytree(model_folder, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] += 0.1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    wrong = call(*asked, "--verify", 1, "--verify-weights", other)
    assert wrong.code == 1
    assert "down_proj" in wrong.err

    vague = call(*asked, "--verify-weights", model_folder)
    assert vague.code == 2
    assert "verify_weights is what" in vague.err


def test_status_shows_names_as_they_are(served: Served, call: Call) -> None:
    """The operator's terminal takes no markup from clients."""
    with symbiosis.connect(served.unix, name="[/b]eve"):
        shown = call("status", "--base", served.unix, "--once")
    assert shown.code == 0, shown
    assert "[/b]eve" in shown.out
