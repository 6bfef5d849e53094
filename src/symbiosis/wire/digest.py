"""Digests: what a hosted model is, in 64 hexadecimal digits that both ends compute alike.

Each file, each hosted weight and each shipped parameter has a SHA-256 of its own, so that what
arrives can be compared by itself; the model's digest is the SHA-256 of that list. Knows bytes
and tensors; knows no model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch

from symbiosis.errors import ProtocolError
from symbiosis.wire.tensors import as_bytes

Entries = Mapping[str, str]
"""``file:NAME``, ``weight:NAME`` (a tied weight's first name) or ``parameter:NAME`` → digest."""

_FORMAT = "symbiosis-digest-1"


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256 over dtype, shape and the row-major little-endian bytes of ``tensor``."""
    data = tensor.detach().cpu().contiguous()
    head = f"{str(data.dtype).removeprefix('torch.')} {list(data.shape)}\n"
    found = hashlib.sha256(head.encode())
    found.update(as_bytes(data))  # releases the interpreter's lock
    return found.hexdigest()


def bytes_digest(data: bytes) -> str:
    """SHA-256 of a file's bytes."""
    return hashlib.sha256(data).hexdigest()


def combined(entries: Entries) -> str:
    """The digest of a model with these entries."""
    text = json.dumps([_FORMAT, sorted(entries.items())], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read_entries(answer: Mapping[str, object]) -> tuple[str, dict[str, str]] | None:
    """The digest and its entries as an executor sent them; None while it computes them.

    Raises ProtocolError unless the entries add up to the digest.
    """
    digest, entries = answer.get("digest"), answer.get("entries")
    if digest is None:
        return None
    if not isinstance(entries, dict) or not all(isinstance(e, str) for e in entries.values()):
        raise ProtocolError("the executor sent no list of digests")
    if combined(entries) != digest:
        raise ProtocolError("the executor's list of digests does not add up to its digest")
    return str(digest), entries
