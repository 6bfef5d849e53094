"""Hosted weights that a private session has itself: an embedding, or all that masks need.

From a local folder of safetensors where there is one, else fetched from the executor, one by one
and with a line in the log. Knows files and the session's requests; knows no masks.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from symbiosis.client.welcome import Identity, WeightInfo
from symbiosis.errors import FetchRefused, PrivacyError

if TYPE_CHECKING:
    from symbiosis.client.session import Session

logger = logging.getLogger(__name__)


class OwnWeights:
    """Reads weights. Does not keep the session, which is given with each call."""

    def __init__(self, folder: str | Path | None) -> None:
        """Raises PrivacyError if there is a folder without safetensors in it."""
        self._folder = folder
        self._files: dict[str, Path] = {}
        if folder is None:
            return
        for path in sorted(Path(folder).glob("*.safetensors")):
            try:
                with safe_open(path, "pt") as file:
                    self._files.update(dict.fromkeys(file.keys(), path))
            except (OSError, SafetensorError) as error:
                raise PrivacyError(f"cannot read the weights in {path}: {error}") from None
        if not self._files:
            raise PrivacyError(
                f"there are no weights in {folder}: privacy needs a folder with the hosted model's "
                f".safetensors files, or none, to fetch them from the executor"
            )

    def read(self, session: Session, info: WeightInfo, why: str) -> Tensor:
        """The whole of a weight, on the CPU, in the executor's dtype: the executor's own numbers,
        wherever they come from.

        Raises PrivacyError, with what to do, if the executor does not hand it out or hosts others.
        """
        name = next((name for full in info.names if (name := self._name_of(full))), None)
        if name is None:
            return self._fetched(session, info, why)
        with safe_open(self._files[name], "pt") as file:
            found: Tensor = file.get_tensor(name)
        if tuple(found.shape) != info.shape:
            raise PrivacyError(
                f"{name} in {self._folder} has the shape {list(found.shape)}; the executor hosts "
                f"{list(info.shape)}: it is another model"
            )
        found = found.to(getattr(torch, str(session.welcome["dtype"])))
        if not _known_in_full(session).has_weight(info.names[0], found):
            raise PrivacyError(
                f"{name} in {self._folder} is not what the executor hosts (their digests differ): "
                f"give the folder of the model that is hosted, as it is hosted, or none, to fetch "
                f"what is needed"
            )
        return found

    def _name_of(self, hosted: str) -> str | None:
        """Files may leave out the base model's prefix."""
        return next((n for n in (hosted, hosted.partition(".")[2]) if n in self._files), None)

    def _fetched(self, session: Session, info: WeightInfo, why: str) -> Tensor:
        name = info.names[0]
        try:
            answer, payload = session._request({"get": "weight", "id": info.id, "why": why})
        except FetchRefused:
            todo = (
                "give a folder with them (Privacy(weights=...), --privacy-weights)"
                if self._folder is None
                else f"{self._folder} lacks it, give a folder with the whole of the hosted model"
            )
            raise PrivacyError(
                f"{why} needs {name} here, and the executor does not hand out weights: {todo}"
            ) from None
        dtype = getattr(torch, str(answer["dtype"]))
        found: Tensor = payload.view(dtype).view(info.shape)
        session._known().check_weight(name, found)
        session._counters.fetched_bytes += len(payload)
        logger.info("fetched %s (%.1f MB) for %s", name, len(payload) / 1e6, why)
        return found


def _known_in_full(session: Session) -> Identity:
    """With the digest of everything in it."""
    known = session._known()
    if known.entries is None:
        answer, _ = session._request({"get": "digest"})
        known = session._identity = known.in_full(answer)
    return known
