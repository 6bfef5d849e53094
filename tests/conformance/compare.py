"""One architecture: a tiny model saved, hosted over a real socket, and compared with itself whole.

What does not run whole is not held against the split run; its reason is recorded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from symbiosis import Executor, Session
from symbiosis.errors import SymbiosisError
from symbiosis.transport.sockets import SocketChannel

from .catalogue import Case
from .inputs import Inputs, inputs_of
from .observe import CHECKS, Table
from .overrides import OVERRIDES
from .recorder import Recorder
from .shrink import tiny_config

Verdict = Literal["exact", "differs", "whole fails", "refused", "split fails", "not applicable"]


@dataclasses.dataclass
class Outcome:
    """How one check ended."""

    verdict: Verdict
    reason: str = ""
    difference: float = 0.0  # largest, relative to the largest number
    trace: str = ""


@dataclasses.dataclass
class Record:
    """What was found out about one architecture; everything here goes to the results file."""

    name: str
    family: str
    checks: dict[str, Outcome] = dataclasses.field(default_factory=dict)
    not_run: str = ""  # why nothing could be compared
    trace: str = ""
    parameters: int = 0
    layers: int = 0
    naive: int = 0  # exchanges of one forward pass, every product by itself
    grouped: int = 0  # the same once it is known which products share an input
    naive_layer: int = 0  # of the layer that needs most
    grouped_layer: int = 0
    fetched_bytes: int = 0  # whole weights that the model itself reads
    fetched_for_lora_bytes: int = 0
    ops: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0


def compare(case: Case) -> Record:
    """Run every check on ``case``."""
    record, started_s = Record(case.name, case.family), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="conformance-") as folder, _quiet():
        try:
            model = tiny_model(case)
            record.parameters = sum(p.numel() for p in model.parameters())
            model.save_pretrained(folder)
            whole = frozen(case.model_class.from_pretrained(folder))
            inputs = inputs_of(whole)
        except Exception as error:  # noqa: BLE001 - any library error is a finding of its own
            record.not_run = f"{_first_line(error)}"
            record.trace = traceback.format_exc()
        else:
            _compare_split(case, record, Path(folder), whole, inputs)
    record.seconds = round(time.monotonic() - started_s, 2)
    return record


def tiny_model(case: Case) -> PreTrainedModel:
    """A small random model; norms, biases and running statistics are random too, so that a
    forgotten one shows."""
    torch.manual_seed(OVERRIDES.get(case.model_type, {}).get("seed", 0))
    config = tiny_config(case.model_class, case.model_type)
    model = case.model_class._from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 and parameter.is_floating_point():
                parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if "running_" in name:
                buffer.add_(0.1 * torch.rand_like(buffer))
    return model


def frozen(model: PreTrainedModel) -> PreTrainedModel:
    """As a base is: no parameter asks for a gradient (torch multiplies otherwise then), and each
    is moved out of the mapped file, where it is not aligned as allocated memory is. The last bits
    of a product on a CPU depend on both, whole and split alike."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def _compare_split(
    case: Case, record: Record, folder: Path, whole: PreTrainedModel, inputs: Inputs
) -> None:
    recorder = Recorder()
    url = f"unix://{folder}/base.sock"
    opener = functools.partial(SocketChannel, url, timeout_s=10.0)
    try:
        with Executor.load(str(folder)) as executor:
            executor.listen([url])
            with Session(recorder.opener(opener), url) as session:
                split = session.model(auto_class=case.model_class)
                for name, check in CHECKS.items():
                    if name == "generate" and not whole.can_generate():
                        outcome = Outcome("not applicable", "it does not generate")
                    else:
                        outcome = _check(check, whole, split, inputs)
                    record.checks[name] = outcome
                    if name == "forward":
                        _count(record, recorder, split, inputs)
                    if name != "lora_gradient":
                        record.fetched_bytes = session.stats().fetched_bytes
                both = session.stats().fetched_bytes
                record.fetched_for_lora_bytes = both - record.fetched_bytes
                record.ops = sorted(recorder.ops)
    except Exception as error:  # noqa: BLE001 - whatever building raises is the finding
        kind: Verdict = "refused" if isinstance(error, SymbiosisError) else "split fails"
        record.checks.setdefault(
            "forward", Outcome(kind, _first_line(error), trace=traceback.format_exc())
        )


def _check(check: Any, whole: PreTrainedModel, split: PreTrainedModel, inputs: Inputs) -> Outcome:
    try:
        expected = check(whole, inputs)
    except Exception as error:  # noqa: BLE001 - what the library cannot do whole is recorded
        return Outcome("whole fails", _first_line(error), trace=traceback.format_exc())
    try:
        outcome = difference(expected, check(split, inputs))
        if any(bool(tensor.isnan().any()) for tensor in expected.values()):
            outcome.reason = f"not a number, run whole; {outcome.reason}"
        return outcome
    except SymbiosisError as error:
        return Outcome("refused", _first_line(error), trace=traceback.format_exc())
    except Exception as error:  # noqa: BLE001 - the finding of this run
        return Outcome("split fails", _first_line(error), trace=traceback.format_exc())


def difference(expected: Table, found: Table) -> Outcome:
    """Bit equality of two tables, or by how much they differ."""
    if expected.keys() != found.keys():
        odd = sorted(expected.keys() ^ found.keys())
        return Outcome("differs", f"{odd[0]} is on one side only", math.inf)
    worst, where = 0.0, ""
    for name, tensor in expected.items():
        amount = _amount(tensor, found[name])
        if amount > worst:
            worst, where = amount, name
    return Outcome("differs", where, worst) if worst else Outcome("exact")


def _amount(a: Tensor, b: Tensor) -> float:
    """0.0 for the same bits (NaN equals NaN), else the largest difference, relative to the
    largest number."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return math.inf
    if torch.equal(torch.nan_to_num(a, nan=1.25e5), torch.nan_to_num(b, nan=1.25e5)):
        return 0.0
    if not a.is_floating_point():
        return math.inf
    amount = float((a - b).abs().max()) / (float(a.abs().max()) or 1.0)
    return math.inf if math.isnan(amount) else amount


def _count(record: Record, recorder: Recorder, split: PreTrainedModel, inputs: Inputs) -> None:
    """Exchanges of a forward pass: by itself each product of the last pass, and after learning."""
    if record.checks["forward"].verdict not in ("exact", "differs"):
        return
    record.naive, record.naive_layer = recorder.products, recorder.worst_layer(products=True)
    forward = CHECKS["forward"]
    forward(split, inputs)
    recorder.clear()
    forward(split, inputs)
    record.grouped, record.grouped_layer = recorder.exchanges, recorder.worst_layer()
    record.layers = recorder.layers


@contextlib.contextmanager
def _quiet() -> Any:
    """Warnings about tiny random models say nothing here."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logger = logging.getLogger("symbiosis")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
