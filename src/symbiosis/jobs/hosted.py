"""What every job asks of the hosted model first: is it the right one, and its tokenizer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from symbiosis.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from symbiosis.client.session import Session

logger = logging.getLogger(__name__)


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


def log_privacy(base: Session) -> None:
    """What was hidden, where anything was to be."""
    report = base.privacy_report()
    if report.mode != "plain":
        logger.info("%s", report)


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
