"""All that a GPU is asked to show, checked and measured in one call.

``python benchmarks/gpu/run.py`` downloads nothing: the models are random. Parts:
``check`` (split against whole, the same numbers), ``exchange`` (its price in process, and between
processes with and without MPS), ``decode`` (1, 4 and 16 clients against HF eager), ``jobs``
(Llama-2-13B: how many fine-tuning jobs fit), ``context`` (a client whose cache and attention are in
host memory, against HF's offloaded cache), ``lent`` (processes that compute with one base, lent by
CUDA IPC, against the whole model) and ``many`` (20 Gemma-2-27B adapters trained at once, or as many
as fit). A part that fails says why and does not stop the others. Every figure stands beside its
physical limit, from the arithmetic and the bandwidths that this machine showed in the same call.

Results are written after each part. ``--out FILE`` keeps what other calls on this device wrote
there, so that the parts may be spread over several calls (``--only``).

``--device cpu --stand-in`` runs every part with tiny models, for a machine without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded
_ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(_ROOT / "src"), str(_ROOT / "benchmarks")]

import psutil  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

import symbiosis  # noqa: E402
from exchange import TINY  # noqa: E402
from harness import (  # noqa: E402
    LLAMA_110M,
    Process,
    environment,
    executor,
    make_model,
    save,
)
from symbiosis.errors import ExchangeFailed  # noqa: E402
from symbiosis.executor.executor import Executor  # noqa: E402
from symbiosis.executor.weights import Weights  # noqa: E402
from symbiosis.transport import device_memory  # noqa: E402
from worker import METHODS  # noqa: E402

GIB = 2**30
_HOST = torch.device("cpu")


@dataclass(frozen=True)
class Sizes:
    """What is measured: the models, and how much of each kind of work."""

    llama: PreTrainedConfig
    gemma: PreTrainedConfig
    checked: tuple[str, dict[str, Any]]  # as `make_model` takes it
    batch: int = 2
    sequence: int = 512
    jobs: int = 4
    adapters: int = 20
    adapter_sequence: int = 256  # so that 20 fit into 139 GiB, logits of 256k words included
    clients: tuple[int, ...] = (1, 4, 16)
    tokens: int = 32
    contexts: tuple[int, ...] = (4096, 32768)
    stand_in: bool = False


STEPS = 3
"""That are timed, after one to warm up: the median counts."""

THREADS = "threads of one interpreter: its lock bounds what they reach together"
"""What the clients of ``decode``, ``jobs`` and ``many`` are; those of ``lent`` are processes."""

MARGIN = 0.95
"""Of the memory that is free: the rest is for what a linear formula does not see."""

EXCHANGED = {"8 KB": 8 << 10, "1 MB": 1 << 20, "16 MB": 16 << 20}
"""What crosses in one exchange, each way."""


def full_sizes() -> Sizes:
    """The published shapes of Llama-2-13B (26 GB in bf16) and Gemma-2-27B (54 GB)."""
    llama = LlamaConfig(
        vocab_size=32000,
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
        max_position_embeddings=65536,
    )
    gemma = Gemma2Config(
        vocab_size=256000,
        hidden_size=4608,
        intermediate_size=36864,
        num_hidden_layers=46,
        num_attention_heads=32,
        num_key_value_heads=16,
        head_dim=128,
        query_pre_attn_scalar=144,
    )
    return Sizes(llama, gemma, ("llama-110m", LLAMA_110M))


def stand_in_sizes() -> Sizes:
    """Everything, small enough for a test on two CPU cores."""
    shape = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
    }
    return Sizes(
        LlamaConfig(**shape),
        Gemma2Config(**shape, head_dim=8),
        ("llama-tiny", TINY),
        sequence=16,
        jobs=2,
        adapters=3,
        clients=(1, 2),
        tokens=4,
        contexts=(64,),
        stand_in=True,
    )


@dataclass(frozen=True)
class Fit:
    """How many jobs fit into a device's memory, in bytes: what a job takes and what all share."""

    available: int
    fixed: int
    job: int

    @property
    def count(self) -> int:
        return max(0, int(MARGIN * self.available - self.fixed) // self.job)

    def __str__(self) -> str:
        return (
            f"({MARGIN} · {self.available / GIB:.1f} GiB - {self.fixed / GIB:.1f}) / "
            f"{self.job / GIB:.3f} = {self.count}"
        )


class Bench:
    """The device, its limits, and the parts; each part returns what goes into the results."""

    def __init__(self, device: str, sizes: Sizes) -> None:
        self.device = torch.device(device)
        self.sizes = sizes

    # The device

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def memory(self) -> int:
        """The most that torch has held since `begin_peak`; without a GPU what the process has."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.device)
        return int(psutil.Process().memory_info().rss)

    def available(self) -> int:
        """What torch holds, and what it could still take."""
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            return free + torch.cuda.memory_reserved(self.device)
        return int(psutil.virtual_memory().available + psutil.Process().memory_info().rss)

    def used(self) -> int:
        """Of the device's memory, by all processes."""
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            return total - free
        return int(psutil.virtual_memory().used)

    def begin_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def give_back(self) -> None:
        """What earlier work left goes back to the device, which takes time to ask for again."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def total_memory(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory
        return int(psutil.virtual_memory().total)

    def describe(self) -> dict[str, Any]:
        cuda = self.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(self.device) if cuda else "cpu (a stand-in)",
            "torch": torch.__version__,
            "memory_gib": self.total_memory() / GIB,
            "copy_gb_per_s": self.copying / 1e9,
            "read_gb_per_s": self.reading / 1e9,
            "host_read_gb_per_s": self.host_reading / 1e9,
            "link_gb_per_s": self.link / 1e9,
            "bf16_tflops": self.flops / 1e12,
        }

    def _best_s(self, once: Callable[[], Any]) -> float:
        times = []
        for _ in range(5):
            self.synchronize()
            started_s = time.perf_counter()
            once()
            self.synchronize()
            times.append(time.perf_counter() - started_s)
        return min(times)

    @functools.cached_property
    def copying(self) -> float:
        """Of the device's memory: bytes/s, read and written, each counted."""
        return 2 * self._copied(self.device, self.device)

    @functools.cached_property
    def reading(self) -> float:
        """Of the device's memory: bytes/s, only read, as decoding does it."""
        return self._read(self.device)

    @functools.cached_property
    def host_reading(self) -> float:
        """The same of the host's memory."""
        return self._read(_HOST)

    def _read(self, device: torch.device) -> float:
        size = GIB if self.device.type == "cuda" else GIB // 16
        a = torch.ones(size // 4, device=device)
        return size / self._best_s(a.sum)

    @functools.cached_property
    def link(self) -> float:
        """Bytes/s from the host's memory to the device's."""
        return self._copied(_HOST, self.device)

    def _copied(self, source: torch.device, target: torch.device) -> float:
        """Bytes/s."""
        size = GIB if self.device.type == "cuda" else GIB // 16
        a = torch.ones(size, dtype=torch.uint8, device=source)
        if source.type != target.type:
            a = a.pin_memory()
        b = torch.empty_like(a, device=target)
        return size / self._best_s(lambda: b.copy_(a))

    @functools.cached_property
    def flops(self) -> float:
        """Of bf16 products, a second."""
        n = 8192 if self.device.type == "cuda" else 512
        a = torch.randn(n, n, device=self.device).to(torch.bfloat16)  # ones would cost less power
        started_s = time.perf_counter()
        while time.perf_counter() - started_s < 0.5:  # until clocks are those of lasting work
            self._best_s(lambda: a @ a)
        return 2 * n**3 / self._best_s(lambda: a @ a)

    def training_limit(self, parameters: int) -> float:
        """Tokens/s: forward, again for the checkpoints, and the gradients of inputs, two operations
        a parameter each."""
        return self.flops / (6 * parameters)

    def made(self, config: PreTrainedConfig) -> PreTrainedModel:
        """A model in bf16 with random weights, made where it will be."""
        torch.manual_seed(0)
        with torch.device(self.device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        return model.requires_grad_(False).eval()

    def ids(self, config: PreTrainedConfig, batch: int, length: int) -> torch.Tensor:
        return torch.randint(1, config.vocab_size, (batch, length), device=self.device)

    # The parts

    def check(self) -> dict[str, Any]:
        """Split against whole in fp32, in process and between processes: the largest difference of
        logits, loss and LoRA gradients, and whether generated tokens are equal."""
        folder = make_model(*self.sizes.checked)
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(self.device)
        whole = whole.requires_grad_(False).eval()
        ids = self.ids(whole.config, 2, 32)
        expected = _outcomes(whole, ids)
        found = {}
        with executor(folder, "--device", str(self.device)) as served:
            hosted = Executor.of(whole)
            for name, base in (
                ("in process", hosted),
                ("unix", served.unix),
                ("unix, host memory", served.unix),
                ("tcp", served.tcp),
            ):
                through = _through_the_host() if "host" in name else contextlib.nullcontext()
                with through, symbiosis.connect(base) as session:
                    outcomes = _outcomes(session.model(device=self.device), ids)
                worst = max(
                    (a.double() - b.double()).abs().max().item()
                    for a, b in zip(outcomes[:-1], expected[:-1], strict=True)
                )
                same = torch.equal(outcomes[-1], expected[-1])
                found[name] = {"largest_difference": worst, "same_tokens": same}
                print(f"  {name}: largest difference {worst:.2g}, same tokens: {same}")
                if worst > 1e-3 or not same:
                    raise AssertionError(f"{name} differs from the whole model: {found[name]}")
            hosted.close()
        return found

    def exchange(self) -> dict[str, Any]:
        """Microseconds of one exchange with a tiny weight: 8 KB, 1 MB and 16 MB each way."""
        folder = make_model("llama-tiny", TINY)
        found: dict[str, Any] = {}
        with (
            Executor.load(str(folder), dtype=torch.float32, device=str(self.device)) as hosted,
            symbiosis.connect(hosted) as session,
        ):
            found["in process"] = _exchange_us(session, str(self.device))
        found["processes"] = self._exchanged(folder)
        found["through the host"] = self._exchanged(folder, "--through-the-host")
        found["with MPS"] = _with_mps(lambda: self._exchanged(folder))
        limits = {
            label: {
                "in process": 2 * size / self.copying,
                "processes": 6 * size / self.copying,
                "through the host": 4 * size / self.link,
            }
            for label, size in EXCHANGED.items()
        }
        for name, times in found.items():
            print(f"  {name}: {times}")
        for label, each in limits.items():
            print(
                f"  {label} each way: 2 · bytes / bandwidth allows {each['in process'] * 1e6:.1f} "
                f"µs in process, 6 · bytes / bandwidth {each['processes'] * 1e6:.1f} between "
                f"processes, 4 · bytes / link {each['through the host'] * 1e6:.1f} through the host"
            )
        return {**found, "limits_s": limits}

    def _exchanged(self, folder: Path, *options: str) -> Any:
        """What `_exchange_us` finds between two processes."""
        device = ("--device", str(self.device))
        command = [sys.executable, __file__, *device, *options, "--exchange-client"]
        with executor(folder, "--device", str(self.device)) as served:
            output = subprocess.check_output([*command, served.unix], text=True, timeout=120)
        return json.loads(output.splitlines()[-1])

    def decode(self) -> dict[str, Any]:
        """Greedy decoders of four methods on one executor; the peer is HF eager, one sequence."""
        sizes = self.sizes
        self.give_back()
        whole = self.made(sizes.llama)
        lone = self._decode([whole])
        floor_s = _bytes_of(whole) / self.reading
        found: dict[str, Any] = {
            "hf_eager_tokens_per_s": lone,
            "limit_steps_per_s": 1 / floor_s,
            "clients": THREADS,
        }
        names = list(METHODS)
        with Executor.of(whole) as hosted:
            for count in sizes.clients:
                with contextlib.ExitStack() as sessions:
                    models = [
                        get_peft_model(
                            self._client(hosted, sessions), METHODS[names[i % len(names)]]()
                        )
                        for i in range(count)
                    ]
                    rate = self._decode(models)
                found[f"{count} clients"] = rate
                print(
                    f"  {count} clients: {rate:.1f} tokens/s, HF eager alone {lone:.1f}: "
                    f"× {rate / lone:.2f}; {count} · bandwidth / weight bytes allows "
                    f"{count / floor_s:.0f}"
                )
        return found

    def jobs(self) -> dict[str, Any]:
        """Fine-tuning jobs (LoRA r = 16, all linear layers, AdamW, checkpointing) on one executor,
        and the same job with a copy of the base to itself."""
        sizes = self.sizes
        self.give_back()
        whole = self.made(sizes.llama)
        parameters = sum(p.numel() for p in whole.parameters())
        lone_s, lone_peak = self._train([Job(whole, self)])
        self.give_back()
        rows = {}
        with Executor.of(whole) as hosted:
            for count in sorted({1, 2, sizes.jobs}):
                with contextlib.ExitStack() as sessions:
                    rows[count] = self._train(
                        [Job(self._client(hosted, sessions), self, seed) for seed in range(count)]
                    )
                self.give_back()
            fit = self._fit((1, rows[1][1]), (sizes.jobs, rows[sizes.jobs][1]))
        tokens = sizes.batch * sizes.sequence
        limit = self.training_limit(parameters)
        for count, (seconds, peak) in rows.items():
            print(
                f"  {count} jobs: {count * tokens / seconds:.0f} tokens/s "
                f"(whole, alone: {tokens / lone_s:.0f}; flops / (6 · parameters) allows "
                f"{limit:.0f}), peak {peak / GIB:.2f} GiB"
            )
        separate = int(MARGIN * fit.available) // lone_peak
        print(
            f"  {fit} jobs on one base, {MARGIN} · {fit.available / GIB:.1f} / "
            f"{lone_peak / GIB:.1f} = {separate} with a base each"
        )
        return {
            "rows": {
                count: {"tokens_per_s": count * tokens / seconds, "peak": peak}
                for count, (seconds, peak) in rows.items()
            },
            "whole": {"tokens_per_s": tokens / lone_s, "peak": lone_peak},
            "limit_tokens_per_s": limit,
            "jobs_that_fit": fit.count,
            "formula": str(fit),
            "separate_that_fit": separate,
            "clients": THREADS,
        }

    def context(self) -> dict[str, Any]:
        """A token after a long context: cache and attention on the device, in host memory beside
        frozen layers on the device, and HF's offloaded cache as the peer."""
        sizes = self.sizes
        found: dict[str, float | str] = {}  # seconds, or why not
        self.give_back()
        whole = self.made(sizes.llama)
        with (
            Executor.of(whole) as hosted,
            symbiosis.connect(hosted) as near,
            symbiosis.connect(hosted) as far,
        ):
            sides = {
                "whole, cache on the device": (whole, False),
                "client on the device": (near.model(device=self.device).eval(), False),
                "client in host memory": (far.model(device="cpu").eval(), False),
            }
            if self.device.type == "cuda":
                sides["whole, offloaded cache"] = (whole, True)
            weights = _bytes_of(whole)
            for length in sizes.contexts:
                cache = self._cache_bytes(whole, length)
                limits = {
                    "whole, cache on the device": (weights + cache) / self.reading,
                    "client on the device": (weights + cache) / self.reading,
                    "client in host memory": weights / self.reading + cache / self.host_reading,
                    "whole, offloaded cache": max(weights / self.reading, cache / self.link),
                }
                for name, (model, offloads) in sides.items():
                    try:
                        seconds = self._token_s(model, length, offloads)
                    except (torch.OutOfMemoryError, ExchangeFailed) as error:
                        if "out of memory" not in str(error):
                            raise
                        found[f"{length}: {name}"] = str(error)
                        continue
                    finally:
                        self.give_back()
                    found[f"{length}: {name}"] = seconds
                    found[f"{length}: {name}, limit"] = limits[name]
                    print(
                        f"  {length} tokens, {name}: {seconds * 1e3:.1f} ms a token; reading "
                        f"weights and cache once allows {limits[name] * 1e3:.1f}"
                    )
        return found

    def lent(self) -> dict[str, Any]:
        """One base, lent to processes of their own: the same logits, and the tokens per second of
        one to several of them, fine-tuning and decoding, beside the whole model in one process."""
        sizes = self.sizes
        self.give_back()
        whole = self.made(sizes.llama)
        seconds, _ = self._train([Job(whole, self)])
        lone = {
            "training": sizes.batch * sizes.sequence / seconds,
            "decoding": self._decode([whole]),
        }
        limits = {
            "training": self.training_limit(sum(p.numel() for p in whole.parameters())),
            "decoding": self.reading / _bytes_of(whole),  # each reads the base for itself
        }
        print(f"  flops / (6 · parameters) and bandwidth / weight bytes allow {limits} tokens/s")
        expected = _probe(whole)
        found: dict[str, Any] = {"whole": lone, "limits": limits}
        with (
            tempfile.TemporaryDirectory() as folder,
            Executor(Weights(whole, "lent", lend=True)) as hosted,
        ):
            url = hosted.listen([f"unix://{folder}/base.sock"])[0]
            self.give_back()  # and what the weights lay in before goes back to the device
            before = self.used()
            for count in sorted({1, 2, sizes.jobs}):
                found[f"{count} processes"] = self._lent_to(count, url, lone, expected, before)
            found["with MPS"] = _with_mps(
                lambda: self._lent_to(sizes.jobs, url, lone, expected, before)
            )
        return found

    def _lent_to(
        self, count: int, url: str, lone: dict[str, float], expected: torch.Tensor, before: int
    ) -> dict[str, float]:
        """Tokens per second of ``count`` processes; ``lone`` are those of the whole model, and
        ``before`` the memory that was in use without them."""
        with contextlib.ExitStack() as stack:
            borrowers = [_borrower(url, self) for _ in range(count)]
            for borrower in borrowers:
                stack.callback(borrower.close)
            overdue = threading.Timer(240, _kill, [borrowers])
            stack.callback(overdue.cancel)
            overdue.start()
            for borrower in borrowers:
                borrower.ready()
            rates = {kind: _rate(borrowers, kind) for kind in lone}
            used = self.used() - before
            for borrower in borrowers:
                with tempfile.NamedTemporaryFile(suffix=".pt") as file:
                    borrower.run(do="logits", file=file.name)
                    if not torch.equal(torch.load(file.name), expected):
                        raise AssertionError("a borrower's logits are not the whole model's")
        print(
            f"  {count} processes: "
            + ", ".join(
                f"{kind} {rate:.1f} tokens/s (whole, alone {lone[kind]:.1f}: "
                f"× {rate / lone[kind]:.2f})"
                for kind, rate in rates.items()
            )
            + f", {used / GIB:.2f} GiB beside the base",
            flush=True,
        )
        return {**rates, "bytes_beside_the_base": used}

    def many(self) -> dict[str, Any]:
        """As many Gemma-2 adapters (LoRA r = 8 on the attention) as the paper's own figure asks
        for, trained at once; or as many as fit, by what one and two of them take."""
        sizes = self.sizes
        self.give_back()
        config = sizes.gemma
        need = _parameters_of(config) * 2
        if need > MARGIN * self.available():
            raise RuntimeError(f"{need / GIB:.0f} GiB of weights do not fit into this device")
        with Executor.of(self.made(config)) as hosted:
            base, parameters = hosted.weights.num_bytes, hosted.weights.num_parameters
            fit = self._fit(*((count, self._adapters(hosted, count)[1]) for count in (1, 2)))
            count = max(1, min(sizes.adapters, fit.count))
            print(f"  {fit} adapters fit: {count} train", flush=True)
            seconds, peak = self._adapters(hosted, count)
        tokens = count * sizes.adapter_sequence
        allowed = self.training_limit(parameters)
        print(
            f"  {count} adapters at once: {tokens / seconds:.0f} tokens/s "
            f"(flops / (6 · parameters) allows {allowed:.0f}), peak {peak / GIB:.1f} GiB, "
            f"the base {base / GIB:.1f} of it"
        )
        return {
            "adapters": count,
            "asked_for": sizes.adapters,
            "formula": str(fit),
            "tokens_per_s": tokens / seconds,
            "limit_tokens_per_s": allowed,
            "peak": peak,
            "base": base,
            "clients": THREADS,
        }

    def _adapters(self, hosted: Executor, count: int) -> tuple[float, int]:
        shape = 1, self.sizes.adapter_sequence
        try:
            with contextlib.ExitStack() as sessions:
                return self._train(
                    [
                        Job(self._client(hosted, sessions), self, seed, _on_attention, shape)
                        for seed in range(count)
                    ]
                )
        finally:
            self.give_back()

    def _fit(self, few: tuple[int, int], more: tuple[int, int]) -> Fit:
        """From two counts of jobs and the memory that each took."""
        job = max(1, (more[1] - few[1]) // (more[0] - few[0]))
        return Fit(self.available(), few[1] - few[0] * job, job)

    # Work

    def _client(self, hosted: Executor, sessions: contextlib.ExitStack) -> PreTrainedModel:
        session = sessions.enter_context(symbiosis.connect(hosted))
        return session.model(device=self.device).eval()

    def _train(self, jobs: list[Job]) -> tuple[float, int]:
        """Seconds of a step of each at once, and the peak memory."""
        steps = [job.step for job in jobs]
        losses = _together(steps)[1]
        self.begin_peak()
        times = []
        for _ in range(STEPS):
            seconds, more = _together(steps)
            times.append(seconds)
            losses += more
        if not all(map(_finite, losses)):
            raise AssertionError(f"losses {losses}")
        peak = self.memory()
        for job in jobs:
            job.end()
        return statistics.median(times), peak

    def _decode(self, models: list[Any]) -> float:
        """Tokens per second of all together, prompts not counted."""
        tokens, times = self.sizes.tokens, []
        for _ in range(1 + STEPS):
            prompted = [self._prompted(model) for model in models]
            pairs = zip(models, prompted, strict=True)
            times.append(_together([functools.partial(self._go_on, *p, tokens) for p in pairs])[0])
        return len(models) * tokens / statistics.median(times[1:])

    @torch.no_grad()
    def _prompted(self, model: Any) -> Any:
        ids = self.ids(model.config, 1, 16)
        out = model(ids, use_cache=True, logits_to_keep=1)
        self.synchronize()
        return out

    @torch.no_grad()
    def _go_on(self, model: Any, out: Any, tokens: int) -> None:
        cache = out.past_key_values
        for _ in range(tokens):
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, past_key_values=cache, use_cache=True)
        self.synchronize()

    def _cache_bytes(self, model: PreTrainedModel, length: int) -> int:
        """Keys and values of ``length`` tokens."""
        config = model.config
        heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        return int(2 * config.num_hidden_layers * heads * width * length * model.dtype.itemsize)

    @torch.no_grad()
    def _token_s(self, model: Any, length: int, offloads: bool) -> float:
        """The median time of a token after ``length`` random keys and values."""
        config = model.config
        cache = DynamicCache(config=config, **({"offloading": True} if offloads else {}))
        heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        keys = torch.randn(1, heads, length, width, dtype=model.dtype, device=model.device)
        for layer in range(config.num_hidden_layers):
            cache.update(keys, keys, layer)  # which copies them
        del keys
        token = torch.ones(1, 1, dtype=torch.long, device=model.device)
        times = []
        for _ in range(6):
            self.synchronize()
            started_s = time.perf_counter()
            model(token, past_key_values=cache, use_cache=True)
            self.synchronize()
            times.append(time.perf_counter() - started_s)
        return statistics.median(times[1:])


class Job:
    """One fine-tuning job in this process."""

    def __init__(
        self,
        model: PreTrainedModel,
        bench: Bench,
        seed: int = 0,
        lora: Callable[[], LoraConfig] = lambda: LoraConfig(r=16, target_modules="all-linear"),
        shape: tuple[int, int] | None = None,
    ) -> None:
        torch.manual_seed(seed)
        self._base = model
        self._hooks = model.get_input_embeddings()._forward_hooks
        self._hooks_before = set(self._hooks)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        self._model = get_peft_model(model, lora()).train()  # and inputs that ask for gradients
        sizes = bench.sizes
        self._ids = bench.ids(model.config, *(shape or (sizes.batch, sizes.sequence)))
        trainable = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(trainable, 1e-4)
        self._synchronize = bench.synchronize

    def step(self) -> float:
        loss = self._model(self._ids, labels=self._ids, use_cache=False).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._synchronize()
        return float(loss.detach())

    def end(self) -> None:
        """Leaves the base as it was."""
        self._model.unload()
        self._base.gradient_checkpointing_disable()
        for hook in set(self._hooks) - self._hooks_before:  # transformers' and peft's own
            del self._hooks[hook]
        self._base.eval()
        del self._optimizer


def _on_attention() -> LoraConfig:
    return LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])


def _kill(processes: list[Process]) -> None:
    for each in processes:
        os.kill(each.pid, signal.SIGKILL)


def _borrower(url: str, bench: Bench) -> Process:
    """A process that borrows the base, and does as it is told; see `borrow`."""
    stand_in = ["--stand-in"] if bench.sizes.stand_in else []
    command = [sys.executable, __file__, "--device", str(bench.device), *stand_in]
    return Process([*command, "--borrower", url], environment(passive=True, command="generate"))


def _rate(borrowers: list[Process], kind: str) -> float:
    """Tokens per second of all together, from the first that begins to the last that ends, by the
    clock that processes share; prompts are not counted."""
    rates = []
    for _ in range(1 + STEPS):
        if kind == "decoding":
            _all(borrowers, "prompt")
        done = _all(borrowers, kind)
        span_s = max(each["ended_s"] for each in done) - min(each["started_s"] for each in done)
        rates.append(sum(each["tokens"] for each in done) / span_s)
    return float(statistics.median(rates[1:]))


def _all(borrowers: list[Process], kind: str) -> list[dict[str, Any]]:
    for borrower in borrowers:
        borrower.start(do=kind)
    return [borrower.finish() for borrower in borrowers]


def borrow(url: str, bench: Bench) -> None:
    """A borrower's process: answers each command with the tokens that it has computed, and when."""
    sizes = bench.sizes
    with symbiosis.connect(url) as session:
        model = session.model(device=bench.device).eval()
        print(json.dumps({"ready": True}), flush=True)
        job: Job | None = None
        for line in sys.stdin:
            command = json.loads(line)
            kind, tokens, started_s = command["do"], 0, time.monotonic()
            if kind != "training" and job is not None:
                job.end()
                job = None
            if kind == "logits":
                torch.save(_probe(model), command["file"])
            elif kind == "prompt":
                prompted = bench._prompted(model)
            elif kind == "training":
                job = job or Job(model, bench)
                job.step()
                tokens = sizes.batch * sizes.sequence
            else:
                bench._go_on(model, prompted, sizes.tokens)
                tokens = sizes.tokens
            times = {"started_s": started_s, "ended_s": time.monotonic()}
            if session.stats().exchanges:
                raise AssertionError("nothing was lent: it exchanges")
            print(json.dumps({"tokens": tokens, **times}), flush=True)


@torch.no_grad()
def _probe(model: PreTrainedModel) -> torch.Tensor:
    """Logits of fixed ids, on the CPU."""
    ids = torch.arange(1, 33, device=model.device)[None]
    found: torch.Tensor = model(ids).logits
    return found.cpu()


def _together(work: list[Callable[[], Any]]) -> tuple[float, list[Any]]:
    """Each in a thread, begun at once: seconds until the last is done, and what they return."""
    begin = threading.Barrier(len(work) + 1)

    def one(do: Callable[[], Any]) -> Any:
        begin.wait()
        return do()

    with ThreadPoolExecutor(len(work)) as pool:
        running = [pool.submit(one, do) for do in work]
        begin.wait()
        started_s = time.perf_counter()
        outcomes = [future.result() for future in running]
    return time.perf_counter() - started_s, outcomes


def _outcomes(model: PreTrainedModel, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Logits, loss, LoRA gradients, and generated ids last."""
    model.eval()
    with torch.no_grad():
        logits = model(ids).logits
    tokens = model.generate(
        input_ids=ids[:1], attention_mask=torch.ones_like(ids[:1]), max_new_tokens=8,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    loss = adapted(ids, labels=ids).loss
    loss.backward()
    gradients = [p.grad.clone() for p in adapted.parameters() if p.grad is not None]
    adapted.unload()
    return (logits, loss.detach(), *gradients, tokens)


def _exchange_us(session: symbiosis.Session, device: str) -> dict[str, float]:
    """The median from the call to the result on the device, by bytes each way."""
    weight = session.model(device=device).model.layers[0].mlp.up_proj.weight
    found = {}
    for label, size in EXCHANGED.items():
        x = torch.randn(size // 4 // weight.shape[1], weight.shape[1], device=device)
        times = []
        for _ in range(300):
            started_s = time.perf_counter()
            with torch.no_grad():
                y = F.linear(x.clone(), weight)
            if y.is_cuda:
                torch.cuda.synchronize(y.device)
            times.append((time.perf_counter() - started_s) * 1e6)
        found[label] = statistics.median(times[50:])
    return found


@contextlib.contextmanager
def _through_the_host() -> Iterator[None]:
    """A client in the block exchanges through the host's memory, as where it sees no GPU of the
    executor's."""
    types, device_memory.EXCHANGED = device_memory.EXCHANGED, ()
    try:
        yield
    finally:
        device_memory.EXCHANGED = types


@contextlib.contextmanager
def _mps() -> Iterator[bool]:
    """A multi-process service of our own while the block runs; False if there is none."""
    if not torch.cuda.is_available() or shutil.which("nvidia-cuda-mps-control") is None:
        yield False
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        places = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        os.environ.update(places)
        try:
            subprocess.run(["nvidia-cuda-mps-control", "-d"], check=True, timeout=30)
            yield True
        finally:
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                subprocess.run(
                    ["nvidia-cuda-mps-control"], input="quit\n", text=True, check=False, timeout=30
                )
            for name in places:
                del os.environ[name]


def _with_mps(work: Callable[[], Any]) -> Any:
    """What ``work`` returns with a multi-process service, or why it does not."""
    try:
        with _mps() as there:
            return work() if there else "no MPS here"
    except (RuntimeError, OSError, ValueError, subprocess.SubprocessError) as error:
        print(f"  with MPS: {error}", flush=True)
        return f"failed: {error}"


def _bytes_of(model: PreTrainedModel) -> int:
    return sum(p.nbytes for p in model.parameters())


def _parameters_of(config: PreTrainedConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


def _finite(loss: float) -> bool:
    return abs(loss) < float("inf")  # false for nan, too


PARTS = ("check", "exchange", "decode", "jobs", "context", "lent", "many")
"""Those first that are cheap and say most: a time limit may end the call."""


def _earlier(out: Path | None, machine: dict[str, Any]) -> dict[str, Any]:
    """What other calls wrote to ``out``. Raises ValueError if that was elsewhere."""
    if out is None or not out.exists():
        return {}
    found: dict[str, Any] = json.loads(out.read_text())
    for fact in ("device", "stand_in"):
        if found.get(fact) != machine[fact]:
            raise ValueError(
                f"{out} has results with {fact} {found.get(fact)!r}, and this is "
                f"{machine[fact]!r}: give another --out"
            )
    return found


def _write(out: Path | None, result: dict[str, Any]) -> None:
    if out is None:
        save("gpu-stand-in" if result["stand_in"] else "gpu", result)
        return
    unfinished = out.with_name(f"{out.name}.unfinished")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    unfinished.replace(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--stand-in", action="store_true", help="tiny models")
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--out", type=Path, help="write the results here, not benchmarks/results")
    parser.add_argument("--exchange-client", metavar="URL", help=argparse.SUPPRESS)
    parser.add_argument("--through-the-host", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--borrower", metavar="URL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.exchange_client:
        through = _through_the_host() if options.through_the_host else contextlib.nullcontext()
        with through, symbiosis.connect(options.exchange_client) as session:
            print(json.dumps(_exchange_us(session, options.device)))
        return
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no GPU here: --device cpu --stand-in runs the same code, small")
    bench = Bench(options.device, stand_in_sizes() if options.stand_in else full_sizes())
    if options.borrower:
        borrow(options.borrower, bench)
        return
    machine = {**bench.describe(), "stand_in": options.stand_in}
    print(machine, flush=True)
    try:
        result = {**_earlier(options.out, machine), **machine}
    except ValueError as error:
        parser.error(str(error))
    for part in sorted(options.only, key=PARTS.index):
        print(part, flush=True)
        started_s = time.perf_counter()
        try:
            found = getattr(bench, part)()
        except Exception as error:  # noqa: BLE001 (the other parts are worth having)
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"}
        with contextlib.suppress(RuntimeError):  # of CUDA, that every call after a fault raises
            bench.give_back()
        result[part] = {**found, "part_s": time.perf_counter() - started_s}
        _write(options.out, result)
    if any("error" in result[part] for part in options.only):
        sys.exit(1)


if __name__ == "__main__":
    main()
