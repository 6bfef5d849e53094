"""Runs one method on one model twice, whole and split, and compares everything bit by bit.

Both runs are the same function: apply the method, set its weights to the same non-trivial
values, train, save, load in plain peft. What differs is where the frozen weights are.
"""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from conformance.methods_models import Subject
from conformance.methods_rows import Row, batch
from symbiosis import Executor, Session, connect
from symbiosis.errors import SymbiosisError
from symbiosis.executor.weights import Weights

STEPS = 4
"""Training steps; from the second on a fetch is a fault."""


@dataclass
class Trace:
    """What a run produced, in order; and what it cost where the base is remote."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    fetches_start: int = 0
    fetches_first_step: int = 0
    fetches_later: int = 0
    fetches_save: int = 0
    fetched_bytes: int = 0
    exchanges_per_step: float = 0.0

    def keep(self, stage: str, name: str, value: Tensor | None) -> None:
        if value is not None:
            self.tensors[f"{stage}: {name}"] = value.detach().clone()


@dataclass(frozen=True)
class Outcome:
    """How a method fared on a model."""

    row: str
    model: str
    verdict: str
    """``exact``, ``differs``, ``plain peft cannot``, ``refused`` (by a sentence of ours),
    ``fails`` or ``not installed``."""
    detail: str = ""
    differences: dict[str, float] = field(default_factory=dict)
    """Largest relative difference of each stage that is not bit-equal."""
    fetches_start: int = 0
    fetches_first_step: int = 0
    fetches_later: int = 0
    fetches_save: int = 0
    kept_share: float = 0.0
    """Of the base's hosted bytes, what the client has fetched and keeps."""
    exchanges_per_step: float = 0.0
    reloads: bool = True
    """Does the saved adapter give the same outputs in plain peft as before saving?"""


class Bench:
    """An executor for each model, on a socket, and a folder of trained adapters for it."""

    def __init__(self, folder: Path, subject: Subject) -> None:
        self.subject = subject
        self.experts = folder / "experts"
        _train_experts(subject, self.experts)
        self._executors = {}
        self._urls = {}
        for policy in ("allow", "deny"):
            executor = Executor(Weights(subject.build(), subject.title), fetch=policy)  # type: ignore[arg-type]
            self._urls[policy] = executor.listen([f"unix://{folder}/{policy}.sock"])[0]
            self._executors[policy] = executor
        self.hosted_bytes = self._executors["allow"].weights.num_bytes

    def connect(self, fetch: str = "allow") -> Session:
        return connect(self._urls[fetch])

    def close(self) -> None:
        for executor in self._executors.values():
            executor.close()


@contextmanager
def bench(subject: Subject) -> Iterator[Bench]:
    with TemporaryDirectory() as folder:
        opened = Bench(Path(folder), subject)
        try:
            yield opened
        finally:
            opened.close()


def try_method(row: Row, bench: Bench) -> Outcome:
    """Whole, then split; the difference."""
    subject = bench.subject
    if not row.installed:
        return Outcome(row.name, subject.title, "not installed", f"peft needs {row.needs} for it")
    with _quiet(), TemporaryDirectory() as folder:
        try:
            whole = run(row, bench, subject.build(), None, Path(folder) / "whole")
        except Exception as error:  # noqa: BLE001 (whatever it is, is its entry)
            return Outcome(row.name, subject.title, "plain peft cannot", sentence(error))
        try:
            with bench.connect() as session:
                split = run(row, bench, session.model(), session, Path(folder) / "split")
        except SymbiosisError as error:
            return Outcome(row.name, subject.title, "refused", sentence(error))
        except Exception as error:  # noqa: BLE001 (likewise)
            return Outcome(row.name, subject.title, "fails", sentence(error))
    return _compared(row, bench, whole, split)


def try_without_fetch(row: Row, bench: Bench) -> str:
    """Empty if the method works where the executor keeps its weights, else why it does not."""
    with _quiet(), TemporaryDirectory() as folder, bench.connect("deny") as session:
        try:
            run(row, bench, session.model(), session, Path(folder))
        except SymbiosisError as error:
            return sentence(error)
    return ""


def run(
    row: Row, bench: Bench, model: PreTrainedModel, session: Session | None, folder: Path
) -> Trace:
    """Apply, train, save and load; ``session`` is the one of ``model`` if its base is remote."""
    trace, subject = Trace(), bench.subject
    torch.manual_seed(0)
    tuned = row.apply(model, row.config(subject), subject, bench.experts)
    trace.fetches_start = _fetches(session)
    for name, value in get_peft_model_state_dict(tuned, adapter_name=tuned.active_adapter).items():
        trace.keep("initial weights", name, value)
    vary(tuned)
    if row.trains:
        _train(row, tuned, trace, session)
    before = _logits(row, tuned)
    trace.keep("outputs after training", "logits", before)
    fetched = _fetches(session)
    tuned.save_pretrained(str(folder))
    trace.fetches_save = _fetches(session) - fetched
    _check_files(folder)
    if session is not None:
        trace.fetched_bytes = session.stats().fetched_bytes
    loaded = _load(row, bench, folder)
    trace.keep("outputs after save and load", "logits", _logits(row, loaded))
    return trace


def vary(tuned: torch.nn.Module) -> None:
    """Give each trainable parameter values that make the method do something."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, parameter in sorted(_trainable(tuned)):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.add_(0.05 * noise.to(parameter.dtype))


def _train(row: Row, tuned: PeftModel, trace: Trace, session: Session | None) -> None:
    optimizer = torch.optim.AdamW([p for _, p in _trainable(tuned)], lr=1e-3)
    tuned.train()
    for step in range(STEPS):
        fetches, exchanges = _fetches(session), _exchanges(session)
        torch.manual_seed(10 + step)  # dropout and sampling
        ids = batch(step)
        optimizer.zero_grad()
        found = tuned(input_ids=ids, labels=ids.clone(), **row.extra(ids))
        found.loss.backward()
        if step == 0:
            trace.keep("outputs", "loss", found.loss)
            trace.keep("outputs", "logits", found.logits)
            for name, parameter in _trainable(tuned):
                trace.keep("gradients", name, parameter.grad)
        optimizer.step()
        if hasattr(tuned.base_model, "update_and_allocate"):
            tuned.base_model.update_and_allocate(step + 1)
        if step == 0:
            for name, parameter in _trainable(tuned):
                trace.keep("one optimizer step", name, parameter)
            trace.fetches_first_step = _fetches(session) - fetches
        else:
            trace.fetches_later += _fetches(session) - fetches
        trace.exchanges_per_step = _exchanges(session) - exchanges
    for name, parameter in _trainable(tuned):
        trace.keep(f"{STEPS} optimizer steps", name, parameter)


def _load(row: Row, bench: Bench, folder: Path) -> PeftModel:
    """The saved adapters on a whole model, by plain peft."""
    base = bench.subject.build()
    if row.peft_type == "XLORA":
        base.config.use_cache = False
        return PeftModel.from_pretrained(base, str(folder))
    if not row.trains:
        return row.apply(base, row.config(bench.subject), bench.subject, bench.experts)
    row.before_loading(base, row.config(bench.subject))
    loaded = PeftModel.from_pretrained(base, str(folder))
    if names := sorted(path.parent.name for path in folder.glob("*/adapter_config.json")):
        for name in names:
            loaded.load_adapter(str(folder / name), name)
        loaded.base_model.set_adapter(["default", *names])
    return loaded


def _logits(row: Row, tuned: torch.nn.Module) -> Tensor:
    tuned.eval()
    ids = batch(50)
    torch.manual_seed(3)
    with torch.no_grad():
        return tuned(input_ids=ids, **row.extra(ids)).logits  # type: ignore[no-any-return]


def _trainable(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _train_experts(subject: Subject, folder: Path) -> None:
    """Two LoRA adapters of different values, for the methods that mix trained ones."""
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(20 + seed)
        config = LoraConfig(
            r=4,
            target_modules=list(subject.targets),
            init_lora_weights=False,
            fan_in_fan_out=subject.conv1d,
            task_type="CAUSAL_LM",
        )
        get_peft_model(subject.build(), config).save_pretrained(str(folder / name))


def _check_files(folder: Path) -> None:
    if not list(folder.rglob("adapter_config.json")):
        raise AssertionError("nothing was saved")


def _fetches(session: Session | None) -> int:
    if session is None:
        return 0
    clients = session.executor_stats()["clients"]
    return int(clients[str(session.welcome["session"])]["fetches"])


def _exchanges(session: Session | None) -> int:
    return 0 if session is None else session.stats().exchanges


def _compared(row: Row, bench: Bench, whole: Trace, split: Trace) -> Outcome:
    differences: dict[str, float] = {}
    missing = whole.tensors.keys() ^ split.tensors.keys()
    for name in whole.tensors.keys() & split.tensors.keys():
        found, expected = split.tensors[name], whole.tensors[name]
        if found.shape != expected.shape or not torch.equal(found, expected):
            stage = name.split(":")[0]
            differences[stage] = max(differences.get(stage, 0.0), relative(found, expected))
    before = split.tensors["outputs after training: logits"]
    reloaded = split.tensors["outputs after save and load: logits"]
    return Outcome(
        row.name,
        bench.subject.title,
        "differs" if differences or missing else "exact",
        detail=", ".join(sorted(missing)[:3]),
        differences=differences,
        fetches_start=split.fetches_start,
        fetches_first_step=split.fetches_first_step,
        fetches_later=split.fetches_later,
        fetches_save=split.fetches_save,
        kept_share=split.fetched_bytes / bench.hosted_bytes,
        exchanges_per_step=split.exchanges_per_step,
        reloads=torch.equal(before, reloaded),
    )


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest value; infinite if shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    scale = expected.abs().max().item() or 1.0
    return float((found - expected).abs().max().item() / scale)


def sentence(error: BaseException) -> str:
    """The error's first line, without the addresses of this run."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


@contextmanager
def _quiet() -> Iterator[None]:
    """peft warns a lot about what these tiny models are; a fetch is counted, not logged."""
    loggers = [logging.getLogger(name) for name in ("symbiosis", "transformers", "peft")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        gc.collect()
