"""What a job is to do: frozen, typed, checked when it is made. Knows no torch and no I/O.

A field that is out of range is a ``ValueError`` that names it; a key that no field has is an
error too, with the nearest field. The same dataclasses serve Python callers, configuration
files and the command line.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from symbiosis.errors import SymbiosisError
from symbiosis.privacy.modes import Privacy

SCHEDULERS = (
    "linear",
    "cosine",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "polynomial",
)
"""Learning-rate schedules of transformers that need no further arguments."""


class _Mapped:
    """Specifications can be read from a mapping, with unknown keys as errors."""

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Raises SymbiosisError for an unknown key or a missing one, naming it."""
        known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise SymbiosisError(f"{cls.__name__} has no field {key!r}{hint}")
        try:
            return cls(**values)
        except TypeError as error:
            raise SymbiosisError(f"{cls.__name__}: {error}") from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneSpec(_Mapped):
    """One fine-tuning run. Paths are resolved by the caller's working directory."""

    base: str
    """The executor's address: ``unix:///path.sock``, ``tcp://host:port`` or ``tls://…``."""
    data: Path
    """JSON lines to train on; see `symbiosis.jobs.data` for the formats."""
    out: Path
    """The folder that receives the adapter and the records; nothing is written outside it."""

    method: str = "lora"
    """A PEFT method by name; see `symbiosis.jobs.methods`."""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Options of the method, by the names that peft gives them."""

    eval_data: Path | None = None
    """Held-out JSON lines. Without it, ``eval_fraction`` of ``data`` is held out."""
    eval_fraction: float = 0.1
    """Share of ``data`` that is held out; 0 evaluates on nothing."""
    max_length: int = 1024
    """Examples are cut to this many tokens."""

    epochs: float = 1.0
    """Passes over the data, unless ``steps`` is given."""
    steps: int | None = None
    """Optimizer steps."""
    batch_size: int = 4
    """Examples per exchange with the base."""
    gradient_accumulation: int = 1
    """Batches per optimizer step."""
    learning_rate: float | None = None
    """None takes the method's own; see `symbiosis.jobs.methods.Method.learning_rate`."""
    scheduler: str = "linear"
    """How the learning rate falls; one of `SCHEDULERS`."""
    warmup_steps: int = 0
    """Optimizer steps in which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """Of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 leaves them."""
    seed: int = 0
    """Of the adapter's initial values, the order of the data and dropout."""

    save_steps: int = 100
    """Steps between checkpoints; 0 writes none."""
    eval_steps: int | None = None
    """Steps between evaluations; they always happen before the first and after the last step."""
    log_steps: int = 1
    """Steps between records of progress."""
    resume: bool = False
    """Go on from the last complete checkpoint in ``out``."""
    overwrite: bool = False
    """Replace the run that ``out`` holds."""

    name: str | None = None
    """What ``symbiosis status`` shows."""
    device: str = "cpu"
    """Where the adapter and everything else that is not a frozen weight lives."""
    expect_model: str | None = None
    """Refuse to train if the executor hosts another model than this one."""
    expect_digest: str | None = None
    """Refuse if it hosts other numbers: what ``symbiosis digest`` prints."""
    verify: float = 0.0
    """Share of the exchanges whose products are checked; see `symbiosis.connect`."""
    verify_weights: Path | None = None
    """A folder with the model that is trusted, to check against."""
    privacy: str = "plain"
    """How activations are hidden from the executor; see `symbiosis.Privacy`."""
    privacy_helper: str | None = None
    """The second executor of ``masked-split``."""
    privacy_bits: int = 8
    """Of the weights in the masked modes: 8 or 16."""
    privacy_weights: Path | None = None
    """A local folder with the hosted weights; without it they are fetched."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "max_length", "batch_size", "gradient_accumulation", "log_steps")
        _at_least(self, 0, "warmup_steps", "save_steps", "weight_decay", "max_grad_norm", "seed")
        if self.steps is not None:
            _at_least(self, 1, "steps")
        if self.eval_steps is not None:
            _at_least(self, 1, "eval_steps")
        if self.steps is None and self.epochs <= 0:
            raise ValueError(f"epochs is {self.epochs}; it must be above 0")
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"eval_fraction is {self.eval_fraction}; it must be in [0, 1)")
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be above 0")
        if self.scheduler not in SCHEDULERS:
            raise ValueError(f"scheduler is {self.scheduler!r}; use {', '.join(SCHEDULERS)}")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other")
        _check_trust(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateSpec(_Mapped):
    """One generation: every prompt with every adapter."""

    base: str
    """The executor's address: ``unix:///path.sock``, ``tcp://host:port`` or ``tls://…``."""
    prompts: tuple[str, ...]
    """At least one."""
    adapters: tuple[Path, ...] = ()
    """Folders of adapters; without any the base model answers by itself."""
    max_new_tokens: int = 128
    """The answer ends there, or earlier at the model's end-of-text token."""
    sampling: bool = False
    """Draw tokens by their probability; otherwise the likeliest is taken (greedy)."""
    temperature: float = 1.0
    """Sampling only: below 1 sharper, above 1 flatter."""
    top_p: float = 1.0
    """Sampling only: draw from the smallest set of tokens with this much probability."""
    top_k: int = 0
    """Sampling only: draw from this many likeliest tokens; 0 is no limit."""
    seed: int = 0
    """Sampling only: set anew for every answer, so that each can be had again by itself."""
    chat: bool = False
    """Wrap each prompt as a user's message in the tokenizer's chat template."""
    expect_digest: str | None = None
    """Refuse an executor that hosts other numbers: what ``symbiosis digest`` prints."""
    verify: float = 0.0
    """Share of the exchanges whose products are checked; see `symbiosis.connect`."""
    verify_weights: Path | None = None
    """A folder with the model that is trusted, to check against."""
    name: str | None = None
    """What ``symbiosis status`` shows."""
    device: str = "cpu"
    """Where the adapters, attention and the cache live."""
    privacy: str = "plain"
    """How activations are hidden from the executor; see `symbiosis.Privacy`."""
    privacy_helper: str | None = None
    """The second executor of ``masked-split``."""
    privacy_bits: int = 8
    """Of the weights in the masked modes: 8 or 16."""
    privacy_weights: Path | None = None
    """A local folder with the hosted weights; without it they are fetched."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "max_new_tokens")
        _at_least(self, 0, "top_k", "seed")
        if not self.prompts:
            raise ValueError("prompts is empty; give at least one")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be in (0, 1]")
        _check_trust(self)


def privacy_of(spec: FinetuneSpec | GenerateSpec) -> Privacy:
    """What the job asks for. Raises ValueError."""
    return Privacy(
        mode=spec.privacy,  # type: ignore[arg-type]
        helper=spec.privacy_helper,
        bits=spec.privacy_bits,  # type: ignore[arg-type]
        weights=spec.privacy_weights,
    )


def _check_trust(spec: FinetuneSpec | GenerateSpec) -> None:
    if not 0 <= spec.verify <= 1:
        raise ValueError(f"verify is {spec.verify}; it is a share of the exchanges, 0 to 1")
    if spec.verify_weights is not None and not spec.verify:
        raise ValueError("verify_weights is what answers are compared with: give verify as well")
    if privacy_of(spec).is_masked and spec.verify:
        raise ValueError("verify has no check for masked products; expect_digest pins the model")


def _at_least(spec: object, least: int, *names: str) -> None:
    for name in names:
        value = getattr(spec, name)
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
