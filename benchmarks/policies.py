"""The four policies under decoding, training and mixed load: simulated, and on real processes.

Simulated (the default): the executor's own scheduler in virtual time; see `simulated`. Real
(``--real``): one executor per policy, all in one run and alternated, decoders and a trainer with
LoRA adapters in processes of their own. A reader is a decoder that rests after each token.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from harness import LLAMA_110M, RESULTS, Served, Worker, executor, make_model, save
from simulated import Client, Machine, Shape, decoder, llama, simulate, trainer
from symbiosis.executor.scheduler import POLICIES, Policy

READING_PAUSE_S = 0.15
SMALL = {**LLAMA_110M, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8}
SMALL |= {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 8000}

Load = Callable[[Shape], list[Client]]


def crowd(decoders: int, trainers: int = 0, pause_s: float = 0.0) -> Load:
    """Decoders that arrive one after the other, and trainers beside them."""
    return lambda shape: [
        *(decoder(i, shape, pause_s=pause_s, arrives_s=0.0137 * i) for i in range(decoders)),
        *(trainer(10_000 + i, shape) for i in range(trainers)),
    ]


def coming_and_going(count: int) -> Load:
    """Skewed lengths (most are short, a few very long), different speeds, arrivals over time."""
    return lambda shape: [
        decoder(
            i,
            shape,
            arrives_s=0.05 * i,
            tokens=2 + 600 // (1 + i * 7919 % 97),
            think=1 + (i % 4) / 8,
        )
        for i in range(count)
    ]


LOADS: dict[str, Load] = {
    "1 decoder": crowd(1),
    "4 decoders": crowd(4),
    "16 decoders": crowd(16),
    "64 decoders": crowd(64),
    "1 trainer": crowd(0, 1),
    "1 decoder + 1 trainer": crowd(1, 1),
    "4 decoders + 1 trainer": crowd(4, 1),
    "16 decoders + 2 trainers": crowd(16, 2),
    "4 readers": crowd(4, 0, READING_PAUSE_S),
    "4 readers + 1 trainer": crowd(4, 1, READING_PAUSE_S),
    "1000 coming and going": coming_and_going(1000),
}


def simulated(seconds: float, only: str) -> dict[str, Any]:
    """A table of policies by loads."""
    shape, machine = llama(), Machine()
    found: dict[str, Any] = {}
    print(f"{'simulated load':<26}{'policy':<10}tokens/s  batch   p50 ms   p99 ms  steps/s")
    for name, load in LOADS.items():
        if only not in name:
            continue
        for policy in POLICIES:
            o = simulate(policy, load(shape), seconds, machine)
            found.setdefault(name, {})[policy] = dataclasses.asdict(o)
            print(
                f"{name:<26}{policy:<10}{o.tokens_per_s:8.1f} {o.mean_batch:6.2f} "
                f"{o.p50_ms:8.1f} {o.p99_ms:8.1f} {o.steps_per_s:8.3f}",
                flush=True,
            )
    return found


class Site:
    """One policy's executor, and the clients, who are the same for all."""

    def __init__(self, served: Served, decoders: list[Worker], trainer: Worker) -> None:
        self.url, self.decoders, self.trainer = served.unix, decoders, trainer
        for worker in (*decoders, trainer):
            worker.run(do="adapt", method="lora", at=self.url)

    def decode(self, count: int, tokens: int, pause_s: float = 0.0, steps: int = 0) -> Any:
        """``count`` decoders at once, and the trainer for ``steps`` beside them."""
        decoders, at = self.decoders[:count], self.url
        before = [worker.run(do="stats", at=at) for worker in decoders]
        if steps:
            self.trainer.start(do="train", at=at, steps=steps, batch=2, context=256)
        for worker in decoders:
            worker.start(do="decode", at=at, tokens=tokens, context=16, pause_s=pause_s)
        ends = [worker.finish() for worker in decoders]
        trained = self.trainer.finish() if steps else {"tokens_per_s": 0.0}
        after = [worker.run(do="stats", at=at) for worker in decoders]
        gaps = sorted(gap for end in ends for gap in end["gaps_ms"])
        members = sum(a["mean_batch"] * a["exchanges"] for a in after)
        members -= sum(b["mean_batch"] * b["exchanges"] for b in before)
        sent = sum(a["exchanges"] - b["exchanges"] for a, b in zip(after, before, strict=True))
        return {
            "tokens_per_s": sum(end["tokens_per_s"] for end in ends),
            "mean_batch": members / sent if sent else 0.0,
            "p50_ms": gaps[len(gaps) // 2] if gaps else 0.0,
            "p99_ms": gaps[len(gaps) * 99 // 100] if gaps else 0.0,
            "trained_tokens_per_s": trained["tokens_per_s"],
        }


def real(
    policies: list[Policy],
    decoders: int,
    tokens: int,
    steps: int,
    rounds: int,
    config: dict[str, Any],
    only: str,
) -> Any:
    """Medians over rounds; in each round every policy has its turn."""
    model = make_model(f"policies-{config['num_hidden_layers']}x{config['hidden_size']}", config)
    loads: dict[str, dict[str, Any]] = {
        "1 decoder": {"count": 1},
        f"{decoders} decoders": {"count": decoders},
        "1 trainer": {"count": 0, "steps": steps},
        "1 decoder + 1 trainer": {"count": 1, "steps": steps},
        f"{decoders} decoders + 1 trainer": {"count": decoders, "steps": steps},
        f"{decoders} readers": {"count": decoders, "pause_s": READING_PAUSE_S},
        f"{decoders} readers + 1 trainer": {
            "count": decoders,
            "pause_s": READING_PAUSE_S,
            "steps": steps,
        },
    }
    runs: dict[str, dict[str, list[dict[str, float]]]] = {}
    print(f"{'real load':<26}{'policy':<10}tokens/s  batch   p50 ms   p99 ms  trained tokens/s")
    with ExitStack() as stack:
        served = {
            policy: stack.enter_context(executor(model, "--policy", policy, "--threads", "1"))
            for policy in policies
        }
        workers = [
            Worker(served[policies[0]].unix, threads=1, passive=True, seed=i)
            for i in range(decoders + 1)
        ]
        for worker in workers:
            stack.callback(worker.close)
            worker.ready()
        sites = {policy: Site(at, workers[1:], workers[0]) for policy, at in served.items()}
        for site in sites.values():
            site.decode(decoders, 8)
        for name, load in loads.items():
            for _ in range(rounds if only in name else 0):
                for policy, site in sites.items():
                    outcome = site.decode(tokens=tokens, **load)
                    runs.setdefault(name, {}).setdefault(policy, []).append(outcome)
            for measured, outcomes in runs.get(name, {}).items():
                print(_real_row(name, measured, _medians(outcomes)), flush=True)
    return {
        name: {policy: _medians(outcomes) for policy, outcomes in by_policy.items()}
        for name, by_policy in runs.items()
    }


def _medians(outcomes: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(o[key] for o in outcomes) for key in outcomes[0]}


def _real_row(name: str, policy: str, o: dict[str, float]) -> str:
    return (
        f"{name:<26}{policy:<10}{o['tokens_per_s']:8.1f} {o['mean_batch']:6.2f} "
        f"{o['p50_ms']:8.1f} {o['p99_ms']:8.1f} {o['trained_tokens_per_s']:8.1f}"
    )


def show_goals(found: dict[str, Any], decoders: int) -> None:
    """What mixed load must not cost."""
    for policy, alone in found["1 decoder"].items():
        mixed = found["1 decoder + 1 trainer"][policy]
        readers = found[f"{decoders} readers + 1 trainer"][policy]
        kept = readers["trained_tokens_per_s"] / found["1 trainer"][policy]["trained_tokens_per_s"]
        print(
            f"{policy}: p99 beside a trainer {mixed['p99_ms'] / alone['p99_ms']:.2f} × alone "
            f"(goal 2, and one chunk); the trainer keeps {kept:.0%} beside {decoders} readers "
            f"(goal 50%)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--real", action="store_true", help="real processes instead")
    parser.add_argument("--small", action="store_true", help="with a 25M Llama")
    parser.add_argument("--seconds", type=float, default=60.0, help="simulated")
    parser.add_argument("--only", default="", help="loads with this in their names")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--decoders", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    path = RESULTS / "policies.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    result = {key: kept[key] for key in ("simulated", "real") if key in kept}
    if options.real:
        config = SMALL if options.small else LLAMA_110M
        found = real(
            options.policies,
            options.decoders,
            options.tokens,
            options.steps,
            options.rounds,
            config,
            options.only,
        )
        if len(found) == 7:
            show_goals(found, options.decoders)
        result["real"] = {"model": config, **found}
    else:
        result["simulated"] = simulated(options.seconds, options.only)
    if not options.only and options.policies == list(POLICIES):
        save("policies", result)


if __name__ == "__main__":
    main()
