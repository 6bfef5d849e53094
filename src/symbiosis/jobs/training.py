"""transformers' Trainer, adjusted to a model whose frozen weights are not here.

Moves no weights and saves none but the adapter's; evaluates without touching the training's
random numbers, so that how often one looks never changes the result. Checkpoints hold every
trainable tensor: peft's own files leave out what only training needs (the encoder of p-tuning,
AdaLoRA's measure of importance).
Knows Trainer and peft models; knows no sessions and no data files.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from symbiosis.errors import SymbiosisError
from symbiosis.jobs.encode import IGNORED, Encoded, collate
from symbiosis.jobs.record import WRITING, Progress, writing
from symbiosis.jobs.spec import FinetuneSpec

if TYPE_CHECKING:
    from peft import PeftModel

_TRAINABLE = "trainable.safetensors"
_RANKS = "ranks.safetensors"

OnProgress = Callable[[Progress], None]


def make_trainer(
    spec: FinetuneSpec,
    model: PeftModel,
    train: Sequence[Encoded],
    held_out: Sequence[Encoded],
    *,
    pad: int,
    learning_rate: float,
    checkpoints: Path,
) -> AdapterTrainer:
    """A trainer that prints nothing and reports to nobody; add callbacks to hear of it."""
    trainer = AdapterTrainer(
        model=model,
        args=_arguments(spec, learning_rate, checkpoints, evaluates=bool(held_out)),
        data_collator=functools.partial(collate, pad=pad),
        train_dataset=train,
        eval_dataset=held_out or None,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_RankBudget())
    trainer.add_callback(_OwnIntervals())
    return trainer


def save_adapter(model: PeftModel, folder: Path) -> None:
    """The adapter as peft loads it. Base embeddings are never among it: they are frozen, and
    peft's check whether they were resized would ask the hub. Raises WriteFailed."""
    with writing(folder / "adapter_model.safetensors"):
        model.save_pretrained(str(folder), save_embedding_layers=False)


class AdapterTrainer(Trainer):  # type: ignore[misc]
    """Trainer for a PEFT model on a hosted base."""

    control: Any
    _aside: Path | None = None
    """Where a checkpoint is being written."""

    def load(self, checkpoint: Path) -> None:
        """The adapter and the state of a checkpoint, to go on without training."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Held-out loss, the mean over all tokens that carry loss, as ``eval_loss``."""
        metrics = {"eval_loss": self._held_out_loss()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        device = self.args.device
        total, count = 0.0, 0
        self.model.eval()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for batch in self.get_eval_dataloader():
                batch = self._prepare_inputs(batch)
                tokens = int((batch["labels"][:, 1:] != IGNORED).sum())
                total += float(self.model(**batch).loss) * tokens
                count += tokens
        return total / count

    def floating_point_ops(self, inputs: dict[str, Tensor]) -> int:
        """Not counted: it walks over all modules at every step."""
        return 0

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """It was built where it belongs."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Whole or not at all, whenever the process or the machine ends: written aside, and
        renamed when it is on the disk. Of the others the last one is kept."""
        checkpoints = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        with writing(checkpoints / name):
            aside = checkpoints / WRITING
            shutil.rmtree(aside, ignore_errors=True)
            self._aside = aside
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._aside = None
            for file in (aside / name).iterdir():
                _to_disk(file)
            _move_over(aside / name, checkpoints / name)
            _to_disk(checkpoints)
            others = [path for path in checkpoints.glob("checkpoint-*") if path.name != name]
            for path in sorted(others, key=lambda path: path.stat().st_mtime)[:-1]:
                _move_over(path, aside / name)
            shutil.rmtree(aside)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._aside or super()._get_output_dir(trial))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        save_adapter(self.model, folder)
        trainable = {
            name: parameter.detach().cpu().contiguous()
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        save_file(trainable, folder / _TRAINABLE)
        if (allocator := _rank_allocator(self.model)) is not None:
            _save_ranks(self.model, allocator, folder / _RANKS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = load_file(Path(resume_from_checkpoint) / _TRAINABLE)
        trainable = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        if saved.keys() != trainable.keys():
            raise SymbiosisError(f"{resume_from_checkpoint} is the checkpoint of another adapter")
        with torch.no_grad():
            for name, parameter in trainable.items():
                parameter.copy_(saved[name])
        if (allocator := _rank_allocator(self.model)) is not None:
            _load_ranks(self.model, allocator, Path(resume_from_checkpoint) / _RANKS)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_over(path: Path, target: Path) -> None:
    """Rename a folder; one that is there goes first."""
    if target.exists():
        shutil.rmtree(target)
    path.rename(target)


class _OwnIntervals(TrainerCallback):  # type: ignore[misc]
    """How often a resumed run logs, evaluates and saves is what it says, not what was saved."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)


class ProgressReporter(TrainerCallback):  # type: ignore[misc]
    """Turns what Trainer logs into `Progress` records."""

    def __init__(self, on_progress: OnProgress, elapsed_before_s: float) -> None:
        """``elapsed_before_s`` is what earlier processes of the run have taken."""
        self._on_progress = on_progress
        self._started_s = time.monotonic() - elapsed_before_s
        self._step_began_s = 0.0
        self._tokens_before: int | None = None
        self._steps_run = 0
        self.train_s = 0.0
        """Spent in training steps by this process."""
        self.tokens_trained = 0
        """By this process, without padding."""

    @property
    def elapsed_s(self) -> float:
        """Since the run began, over all its processes."""
        return time.monotonic() - self._started_s

    @property
    def tokens_per_s(self) -> float:
        return self.tokens_trained / self.train_s if self.train_s else 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tokens_before = state.num_input_tokens_seen

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step_began_s = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.train_s += time.monotonic() - self._step_began_s
        self.tokens_trained = state.num_input_tokens_seen - (self._tokens_before or 0)
        self._steps_run += 1

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any
    ) -> None:
        if "loss" not in logs and "eval_loss" not in logs:
            return  # Trainer's closing summary
        self._on_progress(
            Progress(
                step=state.global_step,
                steps=state.max_steps,
                loss=logs.get("loss"),
                eval_loss=logs.get("eval_loss"),
                learning_rate=logs.get("learning_rate"),
                grad_norm=logs.get("grad_norm"),
                tokens=state.num_input_tokens_seen,
                tokens_per_s=round(self.tokens_per_s, 1),
                elapsed_s=round(self.elapsed_s, 3),
                eta_s=self._eta_s(state.max_steps - state.global_step),
            )
        )

    def _eta_s(self, steps_left: int) -> float | None:
        if not self._steps_run:
            return None
        return round(self.train_s / self._steps_run * steps_left, 1)


_IMPORTANCE = ("ipt", "exp_avg_ipt", "exp_avg_unc")
"""What AdaLoRA's allocator has learned of each weight, by parameter name; peft does not save it."""


def _rank_allocator(model: Any) -> Any:
    return getattr(getattr(model, "base_model", None), "rankallocator", None)


def _rank_config(model: Any) -> Any:
    return model.peft_config[model.base_model.trainable_adapter_name]


def _save_ranks(model: Any, allocator: Any, file: Path) -> None:
    importance = {
        f"{kind}/{name}": value.detach().cpu().contiguous()
        for kind in _IMPORTANCE
        for name, value in getattr(allocator, kind).items()
    }
    save_file(importance, file, {"rank_pattern": json.dumps(_rank_config(model).rank_pattern)})


def _load_ranks(model: Any, allocator: Any, file: Path) -> None:
    device = next(p.device for p in model.parameters() if p.requires_grad)
    allocator.reset_ipt()
    with safe_open(file, framework="pt") as saved:
        _rank_config(model).rank_pattern = json.loads(saved.metadata()["rank_pattern"])
        for key in saved.keys():  # noqa: SIM118 (no mapping)
            kind, name = key.split("/", 1)
            getattr(allocator, kind)[name] = saved.get_tensor(key).to(device)


class _RankBudget(TrainerCallback):  # type: ignore[misc]
    """AdaLoRA moves its ranks between layers, and wants to be told of every step."""

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        update = getattr(getattr(model, "base_model", None), "update_and_allocate", None)
        if update is not None:
            update(state.global_step)


def _arguments(
    spec: FinetuneSpec, learning_rate: float, checkpoints: Path, *, evaluates: bool
) -> TrainingArguments:
    periodic = evaluates and spec.eval_steps is not None
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=spec.batch_size,
        per_device_eval_batch_size=spec.batch_size,
        gradient_accumulation_steps=spec.gradient_accumulation,
        num_train_epochs=spec.epochs,
        max_steps=-1 if spec.steps is None else spec.steps,
        learning_rate=learning_rate,
        lr_scheduler_type=spec.scheduler,
        warmup_steps=spec.warmup_steps,
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
        seed=spec.seed,
        data_seed=spec.seed,
        use_cpu=torch.device(spec.device).type == "cpu",
        logging_steps=spec.log_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps" if spec.save_steps else "no",
        save_steps=spec.save_steps or 1,
        save_total_limit=2,
        eval_strategy="steps" if periodic else "no",
        eval_steps=spec.eval_steps if periodic else None,
        include_num_input_tokens_seen="non_padding",
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=False,
        report_to="none",
        disable_tqdm=True,
    )
    if arguments.device.type == "cuda":
        arguments._n_gpu = 1  # one device: DataParallel would copy the model
    return arguments
