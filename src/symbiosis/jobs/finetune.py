"""Fine-tuning: trains one adapter on one data set against a hosted base model.

The order of things is the promise: method, data and folder are checked first, then the executor
is asked, then the model is built and the method applied, and only then is anything in the folder
written or replaced. The same specification gives the same adapter, bit for
bit, interrupted and resumed or not, on one machine and number of threads.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
import math
import platform
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import symbiosis
from symbiosis.client.session import Session
from symbiosis.errors import ModelError
from symbiosis.jobs import methods
from symbiosis.jobs.data import Row, digest, read_rows, split
from symbiosis.jobs.encode import Encoded, encode, loss_scope, pad_id
from symbiosis.jobs.hosted import (
    check_device,
    check_hosts,
    connected,
    log_trust,
    tokenizer_of,
)
from symbiosis.jobs.record import Progress, RunFolder
from symbiosis.jobs.spec import FinetuneSpec
from symbiosis.transport.tls import Tls

logger = logging.getLogger(__name__)

_FREE_TO_CHANGE = {
    "base", "out", "name", "expect_model", "resume", "overwrite", "save_steps", "eval_steps",
    "log_steps", "data", "eval_data", "method", "options", "learning_rate", "privacy_helper",
    "privacy_weights", "verify", "verify_weights", "expect_digest",
}  # fmt: skip
"""Fields that a resumed run need not share, or that `_job` records in another form."""


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of a run, as ``run.json`` holds it. Losses in nats per token."""

    method: str
    options: dict[str, Any]
    base_model: str
    base_parameters: int
    trainable_parameters: int
    train_examples: int
    eval_examples: int
    steps: int
    train_loss: float | None
    loss_before: float | None
    loss_after: float | None
    perplexity_before: float | None
    perplexity_after: float | None
    tokens: int
    tokens_per_s: float
    wall_s: float
    exchanges: int
    mean_batch: float
    fetched_bytes: int
    peak_memory_bytes: int
    seed: int
    versions: dict[str, str]


def run(
    spec: FinetuneSpec,
    on_event: Callable[[Progress], None] | None = None,
    *,
    key: str | None = None,
    tls: Tls | None = None,
    helper_key: str | None = None,
) -> Report:
    """Train the adapter that ``spec`` describes; ``on_event`` hears of every logged step.
    ``key``, ``tls`` and ``helper_key`` are as for `symbiosis.connect`; they are written nowhere.

    Raises MethodError, DataError, ModelError, ConnectionFailed and the other errors of a session.
    Interrupted (also by an exception from ``on_event``), it can be resumed from its last
    checkpoint.
    """
    check_device(spec.device, trains=True)
    method = methods.resolve(spec.method, spec.options)
    train, held_out = _read(spec)
    folder = RunFolder(spec.out)
    folder.check(resume=spec.resume, overwrite=spec.overwrite)
    connection = connected(spec, f"finetune {spec.out.name}", "training", key, tls, helper_key)
    with folder, connection as base:
        check_hosts(base, spec.expect_model)
        tokenizer = tokenizer_of(base)
        scope = loss_scope(train[0], tokenizer)
        logger.info("%s: %s examples, loss on %s", spec.data, train[0].format, scope)
        train_set = encode(train, tokenizer, spec.max_length)
        eval_set = encode(held_out, tokenizer, spec.max_length) if held_out else []
        described = _job(spec, method, base)
        if spec.resume:
            folder.begin(described, resume=True)
        job = _Job(spec, method, base, folder, pad_id(tokenizer), train_set, eval_set)
        model = job.adapted()
        if not spec.resume:
            folder.begin(described, resume=False)
        report = job.run(model, on_event or (lambda progress: None))
        log_trust(base)
        return report


class _Job:
    """One run whose preconditions hold."""

    def __init__(
        self,
        spec: FinetuneSpec,
        method: methods.Method,
        base: Session,
        folder: RunFolder,
        pad: int,
        train: list[Encoded],
        held_out: list[Encoded],
    ) -> None:
        self._spec = spec
        self._method = method
        self._base = base
        self._folder = folder
        self._pad = pad
        self._train = train
        self._held_out = held_out

    def adapted(self) -> Any:
        """The model with a new adapter. Raises MethodError, ModelError, FetchRefused."""
        from transformers import set_seed

        model = self._base.model(device=self._spec.device)
        set_seed(self._spec.seed)  # the adapter's initial values are drawn next
        adapted = self._method.apply(model, steps=self._steps())
        if not adapted.get_nb_trainable_parameters()[0]:
            raise ModelError("the method left nothing to train on this model")
        return adapted

    def run(self, model: Any, on_progress: Callable[[Progress], None]) -> Report:
        from symbiosis.jobs.training import ProgressReporter, make_trainer, save_adapter

        checkpoint = self._folder.last_checkpoint() if self._spec.resume else None
        before = self._folder.rewind(_step_of(checkpoint))

        def record(progress: Progress) -> None:
            self._folder.append(progress)
            on_progress(progress)

        trainer = make_trainer(
            self._spec,
            model,
            self._train,
            self._held_out,
            pad=self._pad,
            learning_rate=self._spec.learning_rate or self._method.learning_rate,
            checkpoints=self._folder.checkpoints,
        )
        reporter = ProgressReporter(record, before[-1].elapsed_s if before else 0.0)
        trainer.add_callback(reporter)
        self._announce(trainer.model, checkpoint)
        if self._held_out and checkpoint is None:
            self._evaluate_first(trainer)
        if checkpoint is not None and _step_of(checkpoint) >= self._steps():
            trainer.load(checkpoint)  # Trainer would go through one more step before it looked
        else:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if self._held_out and not self._evaluated_at(trainer.state.global_step):
            trainer.evaluate()
        save_adapter(trainer.model, self._folder.path)
        self._folder.write_curve()
        report = self._report(trainer, reporter)
        self._folder.finish(dataclasses.asdict(report))
        return report

    def _steps(self) -> int:
        """Optimizer steps of the run, as Trainer counts them."""
        if self._spec.steps is not None:
            return self._spec.steps
        batches = math.ceil(len(self._train) / self._spec.batch_size)
        return math.ceil(self._spec.epochs * math.ceil(batches / self._spec.gradient_accumulation))

    def _evaluate_first(self, trainer: Any) -> None:
        trainer.state.max_steps = self._steps()  # Trainer sets it when it begins to train
        trainer.evaluate()

    def _evaluated_at(self, step: int) -> bool:
        return any(r.step == step and r.eval_loss is not None for r in self._folder.records())

    def _announce(self, model: Any, checkpoint: Path | None) -> None:
        trainable, _ = model.get_nb_trainable_parameters()
        logger.info(
            "%s on %s: %s trainable parameters, %d examples to train on, %d held out, %d steps",
            methods.friendly(self._method.peft_type),
            self._base.welcome["model"],
            f"{trainable:,}",
            len(self._train),
            len(self._held_out),
            self._steps(),
        )
        if self._spec.resume:
            where = f"step {_step_of(checkpoint)}" if checkpoint else "the beginning: no checkpoint"
            logger.info("resuming from %s", where)

    def _report(self, trainer: Any, reporter: Any) -> Report:
        records = self._folder.records()
        losses = [r.loss for r in records if r.loss is not None]
        evals = [r.eval_loss for r in records if r.eval_loss is not None]
        stats = self._base.stats()
        first, last = (evals[0], evals[-1]) if evals else (None, None)
        return Report(
            method=methods.friendly(self._method.peft_type),
            options=dict(self._method.options),
            base_model=str(self._base.welcome["model"]),
            base_parameters=int(str(self._base.welcome["parameters"])),
            trainable_parameters=trainer.model.get_nb_trainable_parameters()[0],
            train_examples=len(self._train),
            eval_examples=len(self._held_out),
            steps=trainer.state.global_step,
            train_loss=losses[-1] if losses else None,
            loss_before=first,
            loss_after=last,
            perplexity_before=_perplexity(first),
            perplexity_after=_perplexity(last),
            tokens=trainer.state.num_input_tokens_seen,
            tokens_per_s=round(reporter.tokens_per_s, 1),
            wall_s=round(reporter.elapsed_s, 3),
            exchanges=stats.exchanges,
            mean_batch=round(stats.mean_batch, 3),
            fetched_bytes=stats.fetched_bytes,
            peak_memory_bytes=_peak_memory_bytes(),
            seed=self._spec.seed,
            versions=_versions(),
        )


def _read(spec: FinetuneSpec) -> tuple[list[Row], list[Row]]:
    rows = read_rows(spec.data)
    if spec.eval_data is not None:
        return rows, read_rows(spec.eval_data)
    train, held_out = split(rows, spec.eval_fraction, spec.seed)
    if spec.eval_fraction > 0 and not held_out:
        logger.info("%s: %d examples are too few to hold any out", spec.data, len(rows))
    return train, held_out


def _job(spec: FinetuneSpec, method: methods.Method, base: Session) -> dict[str, Any]:
    """What decides the result."""
    fields = dataclasses.asdict(spec)
    return {
        **{name: value for name, value in fields.items() if name not in _FREE_TO_CHANGE},
        "method": method.peft_type,
        "options": dict(method.options),
        "learning_rate": spec.learning_rate or method.learning_rate,
        "data": digest(spec.data),
        "eval_data": None if spec.eval_data is None else digest(spec.eval_data),
        "model": base.welcome["model"],
        "dtype": base.welcome["dtype"],
        "digest": base.digest,
    }


def _step_of(checkpoint: Path | None) -> int:
    return -1 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])


def _perplexity(loss: float | None) -> float | None:
    return math.exp(loss) if loss is not None and loss < 700 else None


def _peak_memory_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _versions() -> dict[str, str]:
    libraries = ("torch", "transformers", "peft", "accelerate")
    found = {name: importlib.metadata.version(name) for name in libraries}
    return {"symbiosis": symbiosis.__version__, "python": platform.python_version(), **found}
