"""Measures what `symbiosis.jobs.placement` decides by: real tokens on every device of this host."""

from __future__ import annotations

import math
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
import torch

from symbiosis.errors import ModelError
from symbiosis.jobs.generate import load_adapter
from symbiosis.jobs.placement import CacheLayer, Place

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

    from symbiosis.client.session import Session

_SHORT = 16  # tokens of context: a token with so few counts as one without
_WARM_UP = 8  # until chains are learned
_TOKENS = 8  # that are timed
_UPLOAD_BYTES = 256 << 20


def devices() -> list[str]:
    """Where a client can run on this host."""
    return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]


def measure(
    base: Session, device: str, *, long: int = 2048, batch: int = 1, adapter: Path | None = None
) -> tuple[list[CacheLayer], Place]:
    """Decode some tokens with a short cache, and with one of ``long`` tokens of repeated entries
    (or as many as the model has positions for).

    ``adapter`` is a PEFT folder to decode with. Takes as long as some twenty-five tokens. Raises
    ModelError if the model keeps no cache of keys and values, and what connecting raises.
    """
    model = base.model(device=device) if adapter is None else load_adapter(base, adapter, device)
    model.eval()
    with torch.no_grad():
        ids = torch.randint(0, int(model.config.get_text_config().vocab_size), (batch, _SHORT))
        past = getattr(model(ids.to(device), use_cache=True), "past_key_values", None)
        layers = [_layer(layer, batch) for layer in getattr(past, "layers", ())]
        if past is None or not any(layer.bytes_per_token for layer in layers):
            raise ModelError(
                f"{base.welcome['model']} keeps no cache of keys and values that grows with the "
                f"context: wherever its client runs, a longer context costs nothing more"
            )
        _decode(base, model, past, batch, _WARM_UP)
        short = _decode(base, model, past, batch, _TOKENS)
        at_short = _bytes(past)
        most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or long
        _lengthen(past, min(long, most - 2 * _TOKENS))
        _decode(base, model, past, batch, 2)
        longer = _decode(base, model, past, batch, _TOKENS)
        grown = _bytes(past) - at_short
    # What a small cache costs cannot be seen beside the noise; one that is full does not grow.
    slower_s = max(longer.token_s - short.token_s, 0.02 * short.token_s)
    rate = grown / slower_s if grown else math.inf
    place = Place(
        device,
        executor_s=short.executor_s,
        wire_s=short.wire_s,
        client_s=short.client_s,
        cache_bytes_per_s=rate,
        free_bytes=host_free_bytes() if device == "cpu" else _gpu_free_bytes(device),
        upload_bytes_per_s=None if device == "cpu" else _upload_bytes_per_s(device),
    )
    return layers, place


def host_free_bytes() -> int:
    """What the host would give to a cache."""
    return int(psutil.virtual_memory().available)


def _gpu_free_bytes(device: str) -> int:
    """What the GPU would give, and what torch has of it and does not use."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


class _Token(NamedTuple):
    """Where a token's time went; medians."""

    token_s: float
    executor_s: float
    wire_s: float
    client_s: float


def _decode(base: Session, model: PreTrainedModel, past: Cache, batch: int, count: int) -> _Token:
    tokens = []
    token = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
    for _ in range(count):
        before, started_s = base.stats(), time.perf_counter()
        logits = model(token, past_key_values=past, use_cache=True).logits
        token = logits[:, -1:].argmax(-1)
        token.cpu()  # on a GPU: until it is there
        token_s, after = time.perf_counter() - started_s, base.stats()
        waited_s = after.wait_s - before.wait_s
        executor_s = after.compute_s + after.queue_s - before.compute_s - before.queue_s
        tokens.append(_Token(token_s, executor_s, waited_s - executor_s, token_s - waited_s))
    return _Token(*map(statistics.median, zip(*tokens, strict=True)))


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
    """Repeat what is cached; a layer with a window keeps the end of it."""
    more = tokens - past.get_seq_length()
    for number, layer in enumerate(past.layers if more > 0 else ()):
        if _grows(layer):
            times = math.ceil(more / layer.keys.shape[-2])
            keys, values = (
                x.repeat(1, 1, times, 1)[:, :, :more] for x in (layer.keys, layer.values)
            )
            past.update(keys, values, number)


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
