"""What the commands share: the environment, logging, and a few words for figures."""

from __future__ import annotations

import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

_LEVELS = ("debug", "info", "warning", "error")

Base = Annotated[
    str,
    typer.Option(
        "--base",
        envvar="SYMBIOSIS_BASE",
        metavar="URL",
        help="The executor: unix:///path.sock, tcp://host:port or tls://host:port.",
    ),
]
Name = Annotated[
    str | None, typer.Option("--name", help="What `symbiosis status` calls this client.")
]
ExpectDigest = Annotated[
    str | None,
    typer.Option(
        "--expect-digest",
        metavar="DIGEST",
        help="Refuse an executor that hosts other numbers than `symbiosis digest` printed.",
    ),
]
Verify = Annotated[
    float,
    typer.Option(
        "--verify",
        metavar="SHARE",
        help="Check the products of this share of the exchanges (0.05: one in twenty) by random "
        "projections; a wrong one ends the job.",
    ),
]
VerifyWeights = Annotated[
    Path | None,
    typer.Option(
        "--verify-weights",
        metavar="FOLDER",
        help="The model that is trusted, for --verify; without it an executor is held to its own "
        "first answers.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        metavar="N",
        help="CPU threads for the computing; torch's choice if unset.",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device", metavar="cpu|cuda", help="Where everything but the frozen weights is."
    ),
]

_PRIVACY = "Privacy"
PrivacyMode = Annotated[
    str,
    typer.Option(
        "--privacy",
        metavar="plain|masked-local|masked-split|noise",
        rich_help_panel=_PRIVACY,
        help="What the executor's operator sees. plain: everything. masked-local: uniform random "
        "numbers; this machine multiplies the masks, for which it needs the weights. "
        "masked-split: the same, but a second operator's executor multiplies the masks. noise: "
        "the published additive scheme, which does not protect.",
    ),
]
PrivacyHelper = Annotated[
    str | None,
    typer.Option(
        "--privacy-helper",
        metavar="URL",
        rich_help_panel=_PRIVACY,
        help="The second executor of masked-split.",
    ),
]
PrivacyHelperKey = Annotated[
    Path | None,
    typer.Option(
        "--privacy-helper-key-file",
        metavar="FILE",
        rich_help_panel=_PRIVACY,
        help="A file with the API key for the helper, if it asks for one. The executor's is never "
        "sent there.",
    ),
]
PrivacyBits = Annotated[
    int,
    typer.Option(
        "--privacy-bits",
        metavar="8|16",
        rich_help_panel=_PRIVACY,
        help="Of the weights in the masked modes; 16 is near fp32 and slower.",
    ),
]
PrivacyWeights = Annotated[
    Path | None,
    typer.Option(
        "--privacy-weights",
        metavar="FOLDER",
        rich_help_panel=_PRIVACY,
        help="The hosted model's safetensors on this machine; without it weights are fetched.",
    ),
]


def help_of(command: Callable[..., None]) -> str:
    """The docstring as paragraphs: rich would keep its line breaks."""
    text = inspect.cleandoc(command.__doc__ or "")
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def examples(*commands: str) -> str:
    """An epilog; rich joins lines unless an empty one is between them."""
    return "\n\n".join(["[bold]Examples[/bold]", *(_escaped(command) for command in commands)])


def configure_logging() -> None:
    """Our log goes to stderr as plain sentences; other libraries only warn."""
    level = os.environ.get("SYMBIOSIS_LOG", "info").lower()
    if level not in _LEVELS:
        raise typer.BadParameter(f"SYMBIOSIS_LOG is {level!r}; use {', '.join(_LEVELS)}")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Sentences())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("symbiosis").setLevel(level.upper())


def share_cores(command: str | None) -> None:
    """OpenMP's threads sleep while they wait, because executor and clients share the cores; but
    where nobody else is at work they stay awake for a while first, see `symbiosis.waiting`.
    Before torch is loaded."""
    for name, value in openmp(command).items():
        os.environ.setdefault(name, value)


def openmp(command: str | None) -> dict[str, str]:
    """Its settings for a command. Some 4 ms awake last from one product of a decoder to the next;
    0.4 ms from one operation of a trainer to the next, and not into the executor's turn."""
    spins = "10000" if command == "finetune" else "100000"
    return {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": spins}


def debugging() -> bool:
    """The user asked for tracebacks."""
    return os.environ.get("SYMBIOSIS_LOG", "").lower() == "debug"


def quiet_libraries() -> None:
    """transformers and peft draw bars and warn of what is meant to be; call it before use."""
    from transformers.utils import logging as transformers_logging

    if not debugging():
        transformers_logging.set_verbosity_error()
        warnings.filterwarnings("ignore", module=r"(peft|transformers)\.")
        for name in ("torchao", "torch.utils._pytree"):  # peft imports torchao where there is one
            logging.getLogger(name).setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()


def set_threads(threads: int | None) -> None:
    """Of torch, for the whole process."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def fail(error: BaseException) -> int:
    """Print an error as one line; the exit code."""
    print(f"symbiosis: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 1


def amount(number: float) -> str:
    """1234567890 → ``1.23 billion``."""
    for size, word in ((1e12, " trillion"), (1e9, " billion"), (1e6, " million")):
        if number >= size:
            return f"{number / size:.2f}{word}"
    return f"{number:,.0f}"


def size(num_bytes: float) -> str:
    """In units of 1000: ``2.20 GB``."""
    for unit, word in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.2f} {word}"
    return f"{num_bytes:.0f} B"


def duration(seconds: float) -> str:
    """``1:02:03``, or ``2:03`` below an hour."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class _Sentences(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")
