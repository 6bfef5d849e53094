"""Measures what `symbiosis.jobs.placement` decides by: real tokens on every device of this host."""

from __future__ import annotations

import math
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from symbiosis.errors import ModelError
from symbiosis.jobs.generate import load_adapter
from symbiosis.jobs.placement import CacheLayer, Place

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

    from symbiosis.client.session import Session

SHORT = 16
"""Tokens of context with which a token counts as one without."""
_WARM_UP = 8  # until chains are learned
_TOKENS = 8  # that are timed
_UPLOAD_BYTES = 256 << 20


def devices() -> list[str]:
    """Where a client can run on this host."""
    return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]


def measure(
    base: Session, device: str, *, long: int = 2048, batch: int = 1, adapter: Path | None = None
) -> tuple[list[CacheLayer], Place]:
    """Decode some tokens with a short cache and with one of ``long`` tokens of repeated entries.

    ``adapter`` is a PEFT folder to decode with. Takes as long as some twenty-five tokens. Raises
    ModelError if the model keeps no cache of keys and values, and what connecting raises.
    """
    model = base.model(device=device) if adapter is None else load_adapter(base, adapter, device)
    model.eval()
    with torch.no_grad():
        ids = torch.randint(0, int(model.config.get_text_config().vocab_size), (batch, SHORT))
        past = getattr(model(ids.to(device), use_cache=True), "past_key_values", None)
        layers = [_layer(layer, batch) for layer in getattr(past, "layers", ())]
        if past is None or not any(layer.bytes_per_token for layer in layers):
            raise ModelError(
                f"{base.welcome['model']} keeps no cache of keys and values that grows with the "
                f"context: wherever its client runs, a longer context costs nothing more"
            )
        _decode(model, past, batch, _WARM_UP)
        before = base.stats()
        short_s = _decode(model, past, batch, _TOKENS)
        after = base.stats()
        at_short = _bytes(past)
        most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or long
        _lengthen(past, min(long, most - 4 * _TOKENS))
        _decode(model, past, batch, 2)
        long_s = _decode(model, past, batch, _TOKENS)
        grown = _bytes(past) - at_short
    executor_s = (after.compute_s + after.queue_s - before.compute_s - before.queue_s) / _TOKENS
    waited_s = (after.wait_s - before.wait_s) / _TOKENS
    # What a small cache costs cannot be seen beside the noise.
    rate = grown / max(long_s - short_s, 0.02 * short_s) if grown else math.inf
    place = Place(
        device,
        executor_s=executor_s,
        wire_s=max(0.0, waited_s - executor_s),
        client_s=max(0.0, short_s - waited_s),
        cache_bytes_per_s=rate,
        free_bytes=_free_bytes(device),
        upload_bytes_per_s=None if device == "cpu" else _upload_bytes_per_s(device),
    )
    return layers, place


def _decode(model: PreTrainedModel, past: Cache, batch: int, tokens: int) -> float:
    """The median time of a token."""
    times = []
    token = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
    for _ in range(tokens):
        started_s = time.perf_counter()
        logits = model(token, past_key_values=past, use_cache=True).logits
        token = logits[:, -1:].argmax(-1)
        token.cpu()  # on a GPU: until it is there
        times.append(time.perf_counter() - started_s)
    return statistics.median(times)


def _grows(layer: Any) -> bool:
    """Does it keep keys and values as one tensor each? Those of linear attention do not."""
    return isinstance(getattr(layer, "keys", None), torch.Tensor)


def _layer(layer: Any, batch: int) -> CacheLayer:
    if not _grows(layer):
        return CacheLayer(0)
    tokens = layer.keys.shape[-2]
    per_token = (layer.keys.nbytes + layer.values.nbytes) // (tokens * batch)
    return CacheLayer(per_token, getattr(layer, "sliding_window", None))


def _bytes(past: Cache) -> int:
    return sum(x.keys.nbytes + x.values.nbytes for x in past.layers if _grows(x))


def _lengthen(past: Cache, tokens: int) -> None:
    """Repeat what is cached; a layer with a window keeps it as it is."""
    for layer in past.layers:
        if _grows(layer) and getattr(layer, "sliding_window", None) is None:
            times = max(1, tokens // layer.keys.shape[-2])
            layer.keys = layer.keys.repeat(1, 1, times, 1)
            layer.values = layer.values.repeat(1, 1, times, 1)


def _free_bytes(device: str) -> int:
    if device == "cpu":
        return int(psutil.virtual_memory().available)
    return torch.cuda.mem_get_info(device)[0]


def _upload_bytes_per_s(device: str) -> float:
    source = torch.empty(_UPLOAD_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(_UPLOAD_BYTES, dtype=torch.uint8, device=device)
    times = []
    for _ in range(5):
        torch.cuda.synchronize(device)
        started_s = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started_s)
    return _UPLOAD_BYTES / statistics.median(times)
