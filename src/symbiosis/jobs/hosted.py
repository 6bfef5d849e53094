"""What every job asks for first: a session as it is specified, the right model, its tokenizer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import symbiosis
from symbiosis.errors import ModelError, SymbiosisError
from symbiosis.jobs.spec import privacy_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from symbiosis.client.session import PriorityName, Session
    from symbiosis.jobs.spec import FinetuneSpec, GenerateSpec
    from symbiosis.transport.tls import Tls

logger = logging.getLogger(__name__)


def connected(
    spec: FinetuneSpec | GenerateSpec,
    name: str,
    priority: PriorityName,
    key: str | None,
    tls: Tls | None,
    helper_key: str | None,
) -> Session:
    """A session with the executor that ``spec`` names; raises what `symbiosis.connect` raises."""
    return symbiosis.connect(
        spec.base,
        name=spec.name or name,
        priority=priority,
        expect_digest=spec.expect_digest,
        verify=spec.verify,
        weights=None if spec.verify_weights is None else str(spec.verify_weights),
        key=key,
        tls=tls,
        privacy=privacy_of(spec),
        helper_key=helper_key,
    )


def check_device(device: str, what: str = "device", *, trains: bool = False) -> None:
    """Raises SymbiosisError that says ``what`` is wrong if ``device`` cannot be used here, or,
    where a job ``trains``, not by transformers' Trainer."""
    import torch

    try:
        found = torch.device(device)
    except RuntimeError:
        raise SymbiosisError(f"{what} {device!r} is none; use cpu or cuda") from None
    if found.type not in ("cpu", "cuda"):
        raise SymbiosisError(f"{what} {device!r} is not supported; use cpu or cuda")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise SymbiosisError(f"{what} {device}: this torch finds no usable CUDA device")
    if trains and found.type == "cuda" and found.index:
        raise SymbiosisError(
            f"{what} {device}: training runs on the first CUDA device that its process sees; set "
            f"CUDA_VISIBLE_DEVICES={found.index} and use cuda"
        )


def check_hosts(base: Session, expected: str | None) -> None:
    """Raises ModelError that names what is hosted if it is not ``expected``.

    ``expected`` is the hosted name itself, its last part, or a path to the same folder.
    """
    hosted = str(base.welcome["model"])
    if expected is None or expected in (hosted, Path(hosted).name):
        return
    if Path(expected).is_dir() and Path(expected).resolve() == Path(hosted).resolve():
        return
    raise ModelError(
        f"the executor at {base.url} hosts {hosted} ({base.welcome.get('architecture')}), "
        f"not {expected}"
    )


def log_trust(base: Session) -> None:
    """What was hidden and what was verified, where anything was to be."""
    report, stats = base.privacy_report(), base.stats()
    if report.mode != "plain":
        logger.info("%s", report)
    if stats.verified or stats.unverified:
        logger.info(
            "verified %d products of the executor at random, all right; %d that were drawn have "
            "no check",
            stats.verified,
            stats.unverified,
        )


def tokenizer_of(base: Session) -> PreTrainedTokenizerBase:
    """The hosted model's tokenizer. Raises ModelError if there is none that can be used."""
    try:
        return base.tokenizer()
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"the executor at {base.url} ships no usable tokenizer with {base.welcome['model']} "
            f"({reason}); put the tokenizer's files into the model's folder and serve it again"
        ) from error
