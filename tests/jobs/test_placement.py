"""Where a client should run: the arithmetic by hand, and real tokens on this host."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import DynamicCache, PreTrainedModel, StaticCache

import tiny
from symbiosis import Executor, connect
from symbiosis.errors import ModelError
from symbiosis.jobs.measuring import _gpu_free_bytes, measure
from symbiosis.jobs.placement import CacheLayer, Option, Place, cache_bytes, options

Serve = Callable[..., tuple[Executor, str]]

LAYERS = [CacheLayer(1_000)] * 3 + [CacheLayer(1_000, window=100)]
HOST = Place("cpu", 0.010, 0.004, 0.006, cache_bytes_per_s=1e8, free_bytes=10**9)
GPU = Place("cuda:0", 0.010, 0.001, 0.001, 1e10, 10**7, upload_bytes_per_s=1e9)


def ways(places: list[Place], context: int) -> list[Option]:
    return options(LAYERS, places, context, host_free_bytes=HOST.free_bytes)


def test_a_window_bounds_what_a_layer_keeps() -> None:
    assert cache_bytes(LAYERS, 50, 1) == 4 * 50_000
    assert cache_bytes(LAYERS, 1_000, 2) == 2 * (3 * 1_000_000 + 100_000)


def test_a_short_context_belongs_on_the_gpu() -> None:
    best, offloaded, host = ways([HOST, GPU], 100)
    assert (best.device, best.cache, best.fits, best.bound) == (
        "cuda:0",
        "device",
        True,
        "executor",
    )
    assert best.token_s == pytest.approx(0.012 + 400_000 / 1e10)
    assert (offloaded.device, offloaded.cache) == ("cuda:0", "host")
    assert offloaded.token_s == pytest.approx(best.token_s + 400_000 / 1e9)
    assert host.token_s == pytest.approx(0.020 + 400_000 / 1e8)


def test_a_cache_that_does_not_fit_is_copied_to_the_gpu_or_read_by_the_host() -> None:
    found = ways([HOST, GPU], 10_000)  # 30.1 MB
    assert [(o.device, o.cache, o.fits) for o in found] == [
        ("cuda:0", "host", True),
        ("cpu", "device", True),
        ("cuda:0", "device", False),
    ]
    gpu_s = 0.012 + 30_100_000 / 1e10
    assert found[0].bound == "link" and found[0].token_s == pytest.approx(gpu_s + 30_100_000 / 1e9)
    assert found[1].bound == "cache" and found[1].token_s == pytest.approx(0.020 + 0.301)
    # With a slow link the attention is better off where the memory is.
    slow = Place("cuda:0", 0.010, 0.001, 0.001, 1e10, 10**7, upload_bytes_per_s=5e7)
    assert ways([HOST, slow], 10_000)[0].device == "cpu"


def test_the_hosts_memory_counts_where_only_a_gpu_is_looked_at() -> None:
    best, _ = ways([GPU], 10_000)
    assert (best.device, best.cache, best.fits) == ("cuda:0", "host", True)


def test_nowhere_is_said_to_fit_what_fits_nowhere() -> None:
    assert not any(o.fits for o in ways([HOST, GPU], 10_000_000))


def test_what_torch_has_of_a_gpu_and_does_not_use_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    assert _gpu_free_bytes("cuda:0") == 40


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_measured_on_real_tokens(serve: Serve, name: str) -> None:
    model = tiny.BUILDERS[name]()
    _, url = serve(model)
    with connect(url) as base:
        layers, place = measure(base, "cpu", long=64)
    ids = tiny.tokens(1, 10)
    past = model(ids, use_cache=True).past_key_values
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in past.layers)
    assert cache_bytes(layers, 10, 1) == kept
    assert place.device == "cpu" and place.upload_bytes_per_s is None
    assert place.executor_s > 0 and place.wire_s > 0 and place.client_s > 0
    assert place.cache_bytes_per_s > 0 and place.free_bytes > 1 << 20


@pytest.mark.parametrize("window", [8, 64])
def test_a_model_of_windows(serve: Serve, window: int) -> None:
    """They are full before the first token is timed, or fill up before the long ones are."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, sliding_window=window,
    )  # fmt: skip
    _, url = serve(MistralForCausalLM(config))
    with connect(url) as base:
        layers, place = measure(base, "cpu", long=256)
    per_token = 2 * 16 * 4  # keys and values of one head, fp32
    assert layers == [CacheLayer(per_token, window)] * 2
    assert place.cache_bytes_per_s > 0


@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_measured_with_an_adapter(serve: Serve, tmp_path: Path, method: str) -> None:
    model = tiny.llama()
    _, url = serve(model)
    configs = {
        "lora": LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
        "prefix": PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    }
    with connect(url) as base:
        get_peft_model(base.model(), configs[method]).save_pretrained(tmp_path)
        plain, _ = measure(base, "cpu", long=64)
        before = base.stats().exchanges
        layers, place = measure(base, "cpu", long=64, batch=2, adapter=tmp_path)
        assert base.stats().exchanges > before
    assert layers == plain
    assert place.client_s > 0 and place.cache_bytes_per_s > 0


def test_a_model_without_a_growing_cache_says_so(serve: Serve) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=128, hidden_size=32, state_size=4, num_hidden_layers=2)
    _, url = serve(MambaForCausalLM(config))
    with connect(url) as base, pytest.raises(ModelError, match="no cache of keys and values"):
        measure(base, "cpu")


CACHES: dict[str, Callable[[PreTrainedModel], object]] = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=64),
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("where", ["executor's process", "same host", "behind TCP"])
def test_every_place_on_a_cpu_gives_the_same_tokens(serve: Serve, where: str, cache: str) -> None:
    """The client's code is the same wherever it runs; only the address differs."""
    model = tiny.llama()
    executor, url = serve(model, tcp=where == "behind TCP")
    ids = tiny.tokens(1, 40)

    def tokens(model: PreTrainedModel) -> torch.Tensor:
        past = CACHES[cache](model)
        return model.generate(ids, max_new_tokens=8, do_sample=False, past_key_values=past)

    with connect(executor if where == "executor's process" else url) as base:
        assert torch.equal(tokens(base.model()), tokens(model))
