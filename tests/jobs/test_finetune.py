"""Real runs against a real executor on a socket; the oracle: peft and Trainer on a local model."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    set_seed,
)

import symbiosis
from symbiosis.errors import (
    ConnectionFailed,
    DataError,
    FetchRefused,
    MethodError,
    ModelError,
    SymbiosisError,
)
from symbiosis.executor.weights import Weights
from symbiosis.jobs import finetune
from symbiosis.jobs.data import read_rows, split
from symbiosis.jobs.encode import collate, encode, pad_id
from symbiosis.jobs.methods import resolve
from symbiosis.jobs.record import Progress, RunFolder
from symbiosis.jobs.spec import FinetuneSpec

Make = Callable[..., FinetuneSpec]

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_dropout": 0.1},
    "ia3": {},
    "prefix": {"num_virtual_tokens": 5},
    "p-tuning": {"num_virtual_tokens": 5},
    "prompt": {"num_virtual_tokens": 5},
}


@pytest.fixture
def make(base: str, train_file: Path, tmp_path: Path) -> Make:
    """A specification of a short run; any field can be given."""
    defaults = {
        "base": base,
        "data": train_file,
        "out": tmp_path / "out",
        "steps": 6,
        "batch_size": 3,
        "learning_rate": 1e-2,
        "max_length": 64,
        "save_steps": 0,
        "seed": 5,
    }

    def build(**fields: Any) -> FinetuneSpec:
        return FinetuneSpec(**{**defaults, **fields})

    return build


class Interrupted(BaseException):
    """What a signal would raise."""


def interrupt_at(step: int) -> Callable[[Progress], None]:
    def on_event(progress: Progress) -> None:
        if progress.step >= step:
            raise Interrupted

    return on_event


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    found = load_file(folder / "adapter_model.safetensors")
    assert found
    return found


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def train_locally(spec: FinetuneSpec, model_folder: Path, out: Path) -> dict[str, torch.Tensor]:
    """What ``spec`` describes, with nothing of this package but the data and the options."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    train, _ = split(read_rows(spec.data), spec.eval_fraction, spec.seed)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    set_seed(spec.seed)
    method = resolve(spec.method, spec.options)
    adapted = peft.get_peft_model(model, method.config(steps=spec.steps or 0))
    arguments = TrainingArguments(
        output_dir=str(out / "trainer"),
        per_device_train_batch_size=spec.batch_size,
        gradient_accumulation_steps=spec.gradient_accumulation,
        max_steps=spec.steps or -1,
        learning_rate=spec.learning_rate or 0.0,
        seed=spec.seed,
        data_seed=spec.seed,
        save_strategy="no",
        use_cpu=True,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
    )
    collator = functools.partial(collate, pad=pad_id(tokenizer))
    rows = encode(train, tokenizer, spec.max_length)
    Trainer(adapted, arguments, data_collator=collator, train_dataset=rows).train()
    adapted.save_pretrained(out)
    return adapter(out)


@pytest.mark.parametrize("method", METHODS)
def test_the_adapter_is_the_one_that_plain_peft_trains(
    make: Make, method: str, model_folder: Path, tmp_path: Path
) -> None:
    """Bit for bit; and plain peft loads it with the same logits and tokens on both sides."""
    spec = make(method=method, options=METHODS[method], eval_steps=2, gradient_accumulation=2)
    report = finetune.run(spec)
    oracle = train_locally(spec, model_folder, tmp_path / "oracle")
    assert_equal(adapter(spec.out), oracle)
    assert report.steps == 6
    assert report.fetched_bytes == 0
    assert report.loss_before is not None
    assert report.loss_after is not None
    assert report.loss_after != report.loss_before
    _assert_same_answers(spec, model_folder)


def _assert_same_answers(spec: FinetuneSpec, model_folder: Path) -> None:
    local = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    ids = torch.tensor([[5, 9, 33, 120, 7]])
    with symbiosis.connect(spec.base) as session, torch.no_grad():
        plain = peft.PeftModel.from_pretrained(local, str(spec.out)).eval()
        hosted = peft.PeftModel.from_pretrained(session.model(), str(spec.out)).eval()
        assert torch.equal(plain(input_ids=ids).logits, hosted(input_ids=ids).logits)
        options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        expected = plain.generate(input_ids=ids, **options)
        assert torch.equal(expected, hosted.generate(input_ids=ids, **options))


def test_training_lowers_the_loss(make: Make) -> None:
    report = finetune.run(make(steps=30))
    assert report.loss_before is not None
    assert report.loss_after is not None
    assert report.perplexity_after is not None
    assert report.loss_after < report.loss_before - 0.5
    assert report.perplexity_after == pytest.approx(torch.tensor(report.loss_after).exp().item())


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", {"r": 4, "lora_dropout": 0.1}),
        ("p-tuning", {"num_virtual_tokens": 5}),
        ("adalora", {"init_r": 6, "target_r": 2, "tinit": 2, "tfinal": 4, "deltaT": 2}),
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted(
    make: Make, method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """In the middle of an epoch, with dropout, between checkpoints; p-tuning's own files leave
    out its encoder, AdaLoRA's how important each rank was (its ranks are settled at step 12).
    18 examples in batches of 3 are 6 steps per epoch."""
    common = {"method": method, "options": options, "steps": 16, "save_steps": 4, "warmup_steps": 2}
    whole = make(**common, out=tmp_path / "whole")
    finetune.run(whole)
    spec = make(**common, out=tmp_path / "parts")
    for stop in (6, 14):
        resume = dataclasses.replace(spec, resume=stop > 6, eval_steps=3)
        with pytest.raises(Interrupted):
            finetune.run(resume, interrupt_at(stop))
        assert not (spec.out / "run.json").exists()
    report = finetune.run(dataclasses.replace(spec, resume=True))
    assert_equal(adapter(spec.out), adapter(whole.out))
    assert report.steps == 16
    ours, theirs = (RunFolder(s.out).records() for s in (spec, whole))
    losses = [(r.step, r.loss, r.tokens) for r in ours if r.loss is not None]
    assert losses == [(r.step, r.loss, r.tokens) for r in theirs if r.loss is not None]
    assert ours[0].eval_loss == theirs[0].eval_loss == report.loss_before


def test_resuming_at_the_end_of_an_epoch(make: Make, tmp_path: Path) -> None:
    common = {"steps": 14, "save_steps": 6, "options": {"lora_dropout": 0.1}}
    finetune.run(make(**common, out=tmp_path / "whole"))
    with pytest.raises(Interrupted):
        finetune.run(make(**common), interrupt_at(8))
    finetune.run(make(**common, resume=True))
    assert_equal(adapter(tmp_path / "out"), adapter(tmp_path / "whole"))


@pytest.mark.parametrize("scheduler", ["constant", "linear"])
def test_resuming_from_the_very_last_checkpoint(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheduler: str
) -> None:
    """In the middle of an epoch; all that was missing was the end of the run."""
    common = {"steps": 8, "save_steps": 4, "scheduler": scheduler}
    finetune.run(make(**common, out=tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(RunFolder, "write_curve", interrupt)
        finetune.run(make(**common))
    report = finetune.run(make(**common, resume=True))
    assert report.steps == 8
    assert_equal(adapter(tmp_path / "out"), adapter(tmp_path / "whole"))
    ours, theirs = (RunFolder(tmp_path / name).records() for name in ("out", "whole"))
    assert [(r.step, r.loss, r.eval_loss) for r in ours] == [
        (r.step, r.loss, r.eval_loss) for r in theirs
    ]


def interrupt(folder: RunFolder) -> None:
    raise Interrupted


def test_a_resumed_run_keeps_its_own_intervals(make: Make) -> None:
    with pytest.raises(Interrupted):
        finetune.run(make(steps=12, save_steps=2), interrupt_at(3))
    spec = make(steps=12, save_steps=3, eval_steps=2, log_steps=2, resume=True)
    finetune.run(spec)
    records = [r for r in RunFolder(spec.out).records() if r.step > 2]
    assert [r.step for r in records if r.eval_loss is not None] == [4, 6, 8, 10, 12]
    assert [r.step for r in records if r.loss is not None] == [4, 6, 8, 10, 12]


def test_resuming_before_the_first_checkpoint_begins_anew(make: Make, tmp_path: Path) -> None:
    finetune.run(make(out=tmp_path / "whole"))
    with pytest.raises(Interrupted):
        finetune.run(make(), interrupt_at(2))
    finetune.run(make(resume=True))
    assert_equal(adapter(tmp_path / "out"), adapter(tmp_path / "whole"))
    steps = [r.step for r in RunFolder(tmp_path / "out").records() if r.loss is not None]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_resumed_run_must_be_the_same_run(make: Make) -> None:
    with pytest.raises(Interrupted):
        finetune.run(make(), interrupt_at(1))
    with pytest.raises(SymbiosisError, match="batch_size was 3 and is 4; seed was 5 and is 6"):
        finetune.run(make(resume=True, seed=6, batch_size=4))
    with pytest.raises(SymbiosisError, match="options was"):
        finetune.run(make(resume=True, options={"r": 2}))


def test_a_run_is_resumed_on_the_same_base_only(
    make: Make, host: Callable[[Path], str], model_folder: Path, tmp_path: Path
) -> None:
    """At the same place, and called the same."""
    folder = tmp_path / model_folder.name
    shutil.copytree(model_folder, folder)
    first = host(folder)
    with pytest.raises(Interrupted):
        finetune.run(make(base=first), interrupt_at(1))
    with symbiosis.connect(first) as base:
        digest = base.digest
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SymbiosisError, match=f"digest was '{digest}' and is"):
        finetune.run(make(base=host(folder), resume=True))
    finetune.run(make(base=first, resume=True, expect_digest=digest))


def test_the_seed_decides(make: Make, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        finetune.run(make(out=tmp_path / name, seed=seed, steps=2))
    assert_equal(adapter(tmp_path / "a"), adapter(tmp_path / "b"))
    first, other = adapter(tmp_path / "a"), adapter(tmp_path / "c")
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_what_a_run_leaves(make: Make, model_folder: Path, tmp_path: Path) -> None:
    events: list[Progress] = []
    spec = make(eval_steps=3, save_steps=2, log_steps=2, options={"r": 4})
    report = finetune.run(spec, events.append)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name for path in spec.out.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "checkpoints",
        "curve.csv", "curve.png", "job.json", "progress.jsonl", "run.json",
    }  # fmt: skip
    saved = [path.name for path in (spec.out / "checkpoints").iterdir()]
    assert sorted(saved) == ["checkpoint-4", "checkpoint-6"]

    lines = (spec.out / "progress.jsonl").read_text().splitlines()
    assert [Progress(**json.loads(line)) for line in lines] == events
    assert [(e.step, e.eval_loss is not None) for e in events] == [
        (0, True), (2, False), (3, True), (4, False), (6, False), (6, True),
    ]  # fmt: skip
    assert all(event.steps == 6 for event in events)
    assert events[-1].tokens == report.tokens > 0

    run = json.loads((spec.out / "run.json").read_text())
    assert run == dataclasses.asdict(report)
    assert run["method"] == "lora"
    assert run["options"]["r"] == 4
    assert run["base_model"] == str(model_folder)
    assert run["loss_before"] == events[0].eval_loss
    assert run["loss_after"] == events[-1].eval_loss
    assert run["trainable_parameters"] == sum(t.numel() for t in adapter(spec.out).values())
    assert (run["train_examples"], run["eval_examples"]) == (18, 2)
    assert run["exchanges"] > 0
    assert run["mean_batch"] >= 1
    assert run["peak_memory_bytes"] > 1 << 20
    assert run["versions"]["peft"] == peft.__version__

    config = json.loads((spec.out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model_folder)
    with (spec.out / "curve.csv").open() as opened:
        assert len(list(csv.DictReader(opened))) == len(events)


def test_held_out_loss_is_the_mean_over_tokens(make: Make, model_folder: Path) -> None:
    """Computed by hand on the local model, example by example: no batch, no padding."""
    spec = make(steps=1, eval_fraction=0.4, batch_size=3)
    report = finetune.run(spec)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    _, held_out = split(read_rows(spec.data), 0.4, spec.seed)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    total, count = 0.0, 0
    for example in encode(held_out, tokenizer, spec.max_length):
        batch = collate([example], pad_id(tokenizer))
        logits = model(input_ids=batch["input_ids"]).logits[0, :-1]
        targets = batch["labels"][0, 1:]
        total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        count += int((targets != -100).sum())
    assert report.loss_before == pytest.approx(total / count, abs=1e-5)


def test_given_held_out_data_and_none(make: Make, train_file: Path, tmp_path: Path) -> None:
    report = finetune.run(make(steps=1, eval_data=train_file, out=tmp_path / "a"))
    assert (report.train_examples, report.eval_examples) == (20, 20)
    report = finetune.run(make(steps=1, eval_fraction=0, out=tmp_path / "b"))
    assert (report.train_examples, report.eval_examples) == (20, 0)
    assert report.loss_before is None
    assert report.perplexity_after is None
    assert (tmp_path / "b" / "curve.png").exists()


def test_epochs(make: Make) -> None:
    report = finetune.run(make(steps=None, epochs=1.5, gradient_accumulation=2))
    assert report.steps == 5  # 18 examples, 6 batches, 3 steps per epoch
    assert all(r.steps == 5 for r in RunFolder(make().out).records())


def test_nothing_is_written_before_all_is_checked(make: Make, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a b c"}\n{"text": 3}\n')
    nobody = f"unix://{tmp_path}/nobody.sock"
    with pytest.raises(MethodError, match="no PEFT method"):
        finetune.run(make(method="lorra", data=bad, base=nobody))
    with pytest.raises(DataError, match=r"bad.jsonl:2: "):
        finetune.run(make(data=bad, base=nobody))
    with pytest.raises(DataError, match=r"bad.jsonl:2: "):
        finetune.run(make(eval_data=bad, base=nobody))
    with pytest.raises(ConnectionFailed, match=r"no executor answers at .*nobody.sock"):
        finetune.run(make(base=nobody))
    with pytest.raises(DataError, match=r"train.jsonl:\d+: the example is \d+ tokens long"):
        finetune.run(make(max_length=3))
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_the_expected_model(make: Make, model_folder: Path) -> None:
    with pytest.raises(
        ModelError, match=rf"hosts {model_folder} \(LlamaForCausalLM\), not mistral"
    ):
        finetune.run(make(expect_model="mistral"))
    for name in (model_folder.name, str(model_folder), f"{model_folder}/../{model_folder.name}"):
        finetune.run(make(expect_model=name, steps=1, overwrite=True))


def test_a_second_run_is_refused_or_replaces_the_first(make: Make) -> None:
    finetune.run(make(steps=2))
    with pytest.raises(SymbiosisError, match="already holds a run"):
        finetune.run(make(steps=1))
    with pytest.raises(SymbiosisError, match="is complete"):
        finetune.run(make(steps=2, resume=True))
    assert finetune.run(make(steps=1, overwrite=True)).steps == 1


def test_options_that_do_not_fit_the_model(make: Make) -> None:
    with pytest.raises(
        MethodError, match=r"lora cannot be applied to LlamaForCausalLM: .*nothing_like"
    ):
        finetune.run(make(options={"target_modules": ["nothing_like_it"]}))


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"options": {"target_modules": ["nothing_like_it"]}}, "cannot be applied"),
        ({"device": "gpu"}, "'gpu' is none; use cpu or cuda"),
        ({"device": "cuda:77"}, "no usable CUDA device"),
        ({"device": "meta"}, "'meta' is not supported; use cpu or cuda"),
        ({"device": "mps"}, "'mps' is not supported; use cpu or cuda"),
    ],
)
def test_a_run_that_cannot_begin_replaces_nothing(
    make: Make, wrong: dict[str, Any], error: str
) -> None:
    spec = make(steps=2)
    finetune.run(spec)
    before = {path: path.stat().st_mtime_ns for path in spec.out.rglob("*")}
    with pytest.raises(SymbiosisError, match=error):
        finetune.run(make(steps=2, overwrite=True, **wrong))
    assert {path: path.stat().st_mtime_ns for path in spec.out.rglob("*")} == before


def test_an_executor_that_keeps_its_weights(make: Make, model_folder: Path, tmp_path: Path) -> None:
    """DoRA reads them; LoRA does not."""
    weights = Weights.load(str(model_folder))
    with symbiosis.Executor(weights, fetch="deny") as executor:
        (url,) = executor.listen([f"unix://{tmp_path}/deny.sock"])
        assert finetune.run(make(base=url, steps=1)).fetched_bytes == 0
        with pytest.raises(
            FetchRefused,
            match=r"^lora with use_dora=True cannot be used with this executor: .*"
            r"\(peft\.tuners\.lora\.dora\) needs the whole of .*--fetch allow",
        ):
            finetune.run(make(base=url, method="dora", out=tmp_path / "dora"))
        pissa = make(base=url, options={"init_lora_weights": "pissa"}, out=tmp_path / "pissa")
        with pytest.raises(FetchRefused, match=r"^lora with init_lora_weights=pissa cannot be"):
            finetune.run(pissa)
