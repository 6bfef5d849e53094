"""Symbiosis: the base model as a service. One executor, many adapters.

import symbiosis

with symbiosis.connect("unix:///tmp/base.sock") as base:
    model, tokenizer = base.model(), base.tokenizer()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from symbiosis import errors
from symbiosis.errors import SymbiosisError

if TYPE_CHECKING:
    from symbiosis.api import connect
    from symbiosis.client.batched_lora import batch_lora
    from symbiosis.client.session import Session
    from symbiosis.executor.executor import Executor
    from symbiosis.privacy.modes import Privacy, PrivacyReport
    from symbiosis.transport.tls import Tls

__version__ = "0.1.0"
__all__ = [
    "Executor",
    "Privacy",
    "PrivacyReport",
    "Session",
    "SymbiosisError",
    "Tls",
    "__version__",
    "batch_lora",
    "connect",
    "errors",
]

_HOMES = {
    "connect": "symbiosis.api",
    "batch_lora": "symbiosis.client.batched_lora",
    "Privacy": "symbiosis.privacy.modes",
    "PrivacyReport": "symbiosis.privacy.modes",
    "Executor": "symbiosis.executor.executor",
    "Session": "symbiosis.client.session",
    "Tls": "symbiosis.transport.tls",
}


def __getattr__(name: str) -> Any:
    """Import torch and transformers only when they are needed: `symbiosis --help` is instant."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'symbiosis' has no attribute {name!r}")
