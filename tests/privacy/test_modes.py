"""The modes on whole models: the same use, the same answers, and nothing open on the wire."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import pytest
import torch
import transformers
from operators import COMMAND, Base
from recorder import Recorder
from torch import Tensor
from transformers import PreTrainedModel

import tiny
import tiny_files
from symbiosis import Executor, Privacy, Session, connect
from symbiosis.privacy import pool
from symbiosis.wire.exchange import RING_OPS, Op

Serve = Callable[..., tuple[Executor, str]]
IDS = tiny.tokens()
DENSE = ["llama", "llama-biases", "llama-tied", "gpt2"]
SETTINGS = {
    "masked-local": Privacy(mode="masked-local"),
    "masked-local 16": Privacy(mode="masked-local", bits=16),
    "masked-split": Privacy(mode="masked-split", helper="unix:///set/later"),
    "masked-split 16": Privacy(mode="masked-split", bits=16, helper="unix:///set/later"),
    "noise": Privacy(mode="noise"),
    "noise from a pool": Privacy(mode="noise", pool=4, sigma=3.0),
}
CLOSE = {"masked-local": 0.02, "masked-split": 0.02, "noise": 1e-3}
"""Relative errors of logits; a tenth of it with 16 bits is far above what is reached."""


def opened(serve: Serve, model: PreTrainedModel, privacy: Privacy, **options: object) -> Session:
    """A session with a real executor, and for ``masked-split`` with a second one."""
    _, url = serve(model, masked=(8, 16))
    if privacy.helper is not None:
        _, helper = serve(model, masked=(8, 16))
        privacy = Privacy(mode=privacy.mode, bits=privacy.bits, helper=helper)
    return connect(url, privacy=privacy, **options)  # type: ignore[arg-type]


def difference(found: Tensor, wanted: Tensor) -> float:
    return float(((found - wanted).norm() / wanted.norm()).detach())


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", DENSE)
def test_models_answer_as_ever(serve: Serve, name: str, setting: str) -> None:
    """Logits, a LoRA's gradients and greedy text, with heads that are tied and that are not."""
    whole, privacy = tiny.BUILDERS[name](), SETTINGS[setting]
    limit = CLOSE[privacy.mode] / (10 if privacy.bits == 16 else 1)
    config = peft.LoraConfig(target_modules=tiny.attention_of(name), init_lora_weights=False)
    with opened(serve, tiny.BUILDERS[name](), privacy) as session:
        pair = []
        for model in (whole, session.model()):
            torch.manual_seed(0)
            adapted = peft.get_peft_model(model, config)
            loss = adapted(IDS, labels=IDS).loss
            loss.backward()
            with torch.no_grad():
                logits = adapted(IDS).logits
            grads = [p.grad for p in adapted.parameters() if p.requires_grad]
            pair.append((logits, grads))
        (wanted, wanted_grads), (found, grads) = pair
        assert 0 < difference(found, wanted) < limit
        for grad, other in zip(grads, wanted_grads, strict=True):
            assert difference(grad, other) < 3 * limit
        text = session.model().generate(IDS, max_new_tokens=6, do_sample=False)
        if privacy.bits == 16 or privacy.mode == "noise":
            plain = tiny.BUILDERS[name]().generate(IDS, max_new_tokens=6, do_sample=False)
            assert torch.equal(text, plain)
        assert session.privacy_report().mode == privacy.mode


@pytest.mark.parametrize("bits", [8, 16])
def test_both_mask_sources_give_the_same_bits(serve: Serve, bits: int) -> None:
    logits = []
    for mode in ("masked-local", "masked-split"):
        helper = "unix:///set/later" if mode == "masked-split" else None
        privacy = Privacy(mode=mode, bits=bits, helper=helper)  # type: ignore[arg-type]
        with opened(serve, tiny.llama(), privacy) as session:
            model = session.model()
            logits += [model(IDS).logits for _ in range(3)]  # alone, then grouped
    assert all(torch.equal(one, logits[0]) for one in logits)


def no_mask(*args: object) -> Tensor:
    _, rows, width, bits = args
    return torch.zeros(rows, width, dtype=torch.int32 if bits == 8 else torch.int64)  # type: ignore[call-overload]


def trained(session: Session, steps: int) -> tuple[list[float], list[Tensor]]:
    """LoRA for some steps: the losses, and the adapter."""
    torch.manual_seed(0)
    model = peft.get_peft_model(session.model(), peft.LoraConfig(target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    ids = tiny.tokens(4, 12)
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, [p.detach() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("bits", [8, 16])
def test_training_goes_as_without_masks(
    serve: Serve, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """25 steps of LoRA: bit for bit what the same integers give without a mask, and near fp32."""
    privacy = Privacy(mode="masked-local", bits=bits)  # type: ignore[arg-type]
    with opened(serve, tiny.llama(), privacy) as session:
        masked, adapter = trained(session, 25)
    with opened(serve, tiny.llama(), Privacy()) as session:
        plain, _ = trained(session, 25)
    monkeypatch.setattr(pool, "expand", no_mask)
    with opened(serve, tiny.llama(), privacy) as session:
        unmasked, other = trained(session, 25)
    assert masked[-1] < masked[0] - 0.5  # it learns
    assert max(abs(a - b) for a, b in zip(masked, unmasked, strict=True)) <= 1e-5
    assert masked == unmasked
    assert all(torch.equal(a, b) for a, b in zip(adapter, other, strict=True))
    worst = max(abs(a - b) for a, b in zip(masked, plain, strict=True))
    assert worst < (0.05 if bits == 8 else 1e-3)


@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            task_type="CAUSAL_LM",
        ),
        peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
        peft.LoraConfig(target_modules=["q_proj", "v_proj"], use_dora=True),
    ],
    ids=["ia3", "prefix", "dora"],
)
def test_methods(serve: Serve, config: peft.PeftConfig) -> None:
    pair = []
    with opened(serve, tiny.llama(), Privacy(mode="masked-local", bits=16)) as session:
        for base in (tiny.llama(), session.model()):
            torch.manual_seed(0)
            model = peft.get_peft_model(base, config)
            loss = model(IDS, labels=IDS).loss
            loss.backward()
            grads = [p.grad for p in model.parameters() if p.requires_grad]
            pair.append((loss, grads))
    (wanted, wanted_grads), (found, grads) = pair
    assert float((found - wanted).abs().detach()) < 1e-4
    assert len(grads) == len(wanted_grads) > 0
    for grad, other in zip(grads, wanted_grads, strict=True):
        assert float((grad - other).norm()) <= 1e-3 * float(other.norm()) + 1e-9


def test_trainer(serve: Serve, tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row} for row in tiny.tokens(8, 10).tolist()]
    with opened(serve, tiny.llama(), Privacy(mode="masked-local")) as session:
        model = peft.get_peft_model(session.model(), peft.LoraConfig(target_modules="all-linear"))
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=4, learning_rate=1e-2, report_to=[], use_cpu=True,
            save_strategy="no", gradient_checkpointing=True, disable_tqdm=True,
        )  # fmt: skip
        outcome = transformers.Trainer(model, arguments, train_dataset=rows).train()
        assert outcome.global_step == 4
        assert session.privacy_report().masks.used == session.stats().exchanges


def test_bf16_activations(serve: Serve) -> None:
    whole = tiny.llama().to(torch.bfloat16)
    with opened(serve, tiny.llama().to(torch.bfloat16), SETTINGS["masked-local"]) as session:
        logits = session.model()(IDS).logits
    assert logits.dtype is torch.bfloat16
    assert difference(logits.float(), whole(IDS).logits.float()) < 0.05


# Buckets


@pytest.mark.parametrize(
    ("buckets", "rows", "padded"),
    [
        (None, [1, 5, 64], [1, 5, 64]),
        ("powers", [0, 1, 2, 3, 5, 64, 65], [0, 1, 2, 4, 8, 64, 128]),
        ((4, 16), [0, 1, 4, 5, 16, 17, 33], [0, 4, 4, 16, 16, 32, 48]),
    ],
)
def test_buckets(buckets: object, rows: list[int], padded: list[int]) -> None:
    privacy = Privacy(buckets=buckets)  # type: ignore[arg-type]
    assert [privacy.padded(count) for count in rows] == padded


@pytest.fixture(params=["plain", "noise", "masked-local"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def frames_of(recorder: Recorder) -> list[tuple[Op, int, tuple[tuple[int, ...], ...]]]:
    """Operation, weight and shapes of every exchange, and the shapes of its answers."""
    return [
        (s.asked.op, s.asked.weights[0], tuple(x.shape for x in (*s.asked.tensors, *s.answers)))
        for s in recorder.seen
    ]  # type: ignore[misc]


def test_sizes_are_constant_within_a_bucket(serve: Serve, tmp_path: Path, mode: str) -> None:
    """Prompts of 9 to 16 tokens look alike on the wire, frame by frame; of 17 they do not."""
    _, url = serve(tiny.llama(), masked=(8,))
    whole, seen = tiny.llama(), []
    for length in (9, 12, 16, 17):
        ids = tiny.tokens(1, length)
        with Recorder(tmp_path, url) as recorder:
            privacy = Privacy(mode=mode, buckets="powers")  # type: ignore[arg-type]
            with connect(recorder.url, arena_bytes=0, privacy=privacy) as session:
                with torch.no_grad():
                    logits = session.model()(ids).logits
                    assert difference(logits, whole(ids).logits) < 0.02
                seen.append((frames_of(recorder), [f for f in recorder.frames if f[0] == 5]))
                assert "bucket" in str(session.privacy_report())
    assert seen[0][0]
    assert seen[0] == seen[1] == seen[2]
    assert seen[3][1] != seen[0][1]


# What a recorder sees


@pytest.mark.parametrize("bits", [8, 16])
def test_a_recorder_sees_residues_and_no_token(serve: Serve, tmp_path: Path, bits: int) -> None:
    _, url = serve(tiny.llama(), masked=(8, 16))
    rare = [77, 78, 79, 80, 81, 82, 83, 84]
    ids = torch.tensor([rare])
    privacy = Privacy(mode="masked-local", bits=bits)  # type: ignore[arg-type]
    with (
        Recorder(tmp_path, url) as recorder,
        connect(recorder.url, arena_bytes=0, privacy=privacy) as session,
    ):
        model = peft.get_peft_model(session.model(), peft.LoraConfig(target_modules="all-linear"))
        model(ids, labels=ids).loss.backward()
        model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
        assert len(recorder.seen) == session.stats().exchanges > 40
        for seen in recorder.seen:
            assert seen.asked.op in RING_OPS
            assert not any(seen.asked.biases)
            for tensor in (*seen.asked.tensors, *seen.answers):
                assert tensor.dtype is (torch.int32 if bits == 8 else torch.int16)
                flat = tensor.flatten().tolist()
                assert not any(flat[i : i + 8] == rare for i in range(len(flat)))
        said = json.dumps(recorder.requests)
        assert "77" not in said.replace(str(os.getpid()), "")


# Two operators' executors, and the commands


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_files.build_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def two_operators(
    files: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Base, Base]]:
    """Two processes that know nothing of each other."""
    folder = tmp_path_factory.mktemp("operators")
    first, second = (Base(files, folder, "--masked", 8, "--masked", 16) for _ in range(2))
    yield first, second
    first.kill()
    second.kill()


def command(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, args)], capture_output=True, text=True, timeout=200, check=False
    )


def test_commands_with_two_operators(
    two_operators: tuple[Base, Base], files: Path, tmp_path: Path
) -> None:
    first, second = two_operators
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps({"text": "the cat sat"}) + "\n" for _ in range(8)))
    split = ("--privacy", "masked-split", "--privacy-helper", second.url, "--privacy-bits", 16)
    local = ("--privacy", "masked-local", "--privacy-bits", 16, "--privacy-weights", files)
    tuned = command(
        "finetune", "--base", first.url, "--data", data, "--out", tmp_path / "adapter",
        "--steps", 3, "--threads", 1, *split,
    )  # fmt: skip
    assert tuned.returncode == 0, tuned.stderr
    assert "privacy mode masked-split" in tuned.stderr
    texts = []
    for privacy in (split, local, ()):
        answer = command(
            "generate", "--base", first.url, "--adapter", tmp_path / "adapter", "--prompt",
            "the cat", "--max-new-tokens", 8, "--threads", 1, *privacy,
        )  # fmt: skip
        assert answer.returncode == 0, answer.stderr
        assert ("privacy mode" in answer.stderr) == bool(privacy)
        texts.append(answer.stdout)
    assert texts[0]
    assert texts[0] == texts[1] == texts[2]


def test_a_command_that_cannot_keep_it_says_so(two_operators: tuple[Base, Base]) -> None:
    first, _ = two_operators
    outcome = command(
        "generate", "--base", first.url, "--prompt", "x", "--privacy", "masked-split",
        "--privacy-helper", first.url,
    )  # fmt: skip
    assert outcome.returncode == 1
    assert "the helper is the executor itself" in outcome.stderr
    outcome = command("generate", "--base", first.url, "--prompt", "x", "--privacy", "secret")
    assert outcome.returncode == 2
    assert "masked-local" in outcome.stderr


# The report


def test_a_report_says_what_is_so(serve: Serve) -> None:
    with opened(serve, tiny.llama(), Privacy()) as session:
        session.model()(IDS)
        plain = session.privacy_report()
    assert (plain.mode, plain.masks.used) == ("plain", 0)
    assert "none" in plain.guarantee
    assert "tokens, activations" in str(plain)
    with opened(serve, tiny.llama(), SETTINGS["masked-split"]) as session:
        model = session.model()
        for _ in range(3):
            model(IDS)
        report, stats = session.privacy_report(), session.stats()
    assert report.masks.used == report.exchanges == stats.exchanges
    assert report.bytes_sent == stats.bytes_sent > 0
    assert report.masks.bytes_for_products > 0
    assert report.mask_source == "the helper"
    assert any("do not tell each other" in text for text in report.assumptions)
    assert any("rows" in text for text in report.leaks)
    assert "masks used, each once" in str(report)
    with opened(serve, tiny.llama(), SETTINGS["noise"]) as session:
        text = str(session.privacy_report())
    assert "none that can be proven" in text
    assert "private" not in text


def test_no_session_of_a_mode_is_a_plain_one(serve: Serve) -> None:
    """And a plain one is the very class that it was."""
    with opened(serve, tiny.llama(), Privacy()) as session:
        assert type(session) is Session
    assert sys.modules["symbiosis"].Privacy is Privacy
