"""`symbiosis place` against what happens: the predicted time of a token, and the measured one.

A client on the CPU decodes behind a UNIX socket and behind TCP, at several lengths of context.
Predicted from tokens with a short and a long cache, measured by decoding after a prompt of that
length.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the commands do, before torch is loaded

import torch

import symbiosis
from harness import Sample, chosen_model, executor, model_options, save
from symbiosis.client.session import Session
from symbiosis.jobs.measuring import host_free_bytes, measure
from symbiosis.jobs.placement import options as placements

TOKENS = 12


def decoded_s(model: Any, context: int) -> float:
    """The median time of a token after a prompt of ``context`` tokens."""
    with torch.no_grad():
        ids = torch.randint(0, model.config.vocab_size, (1, context))
        out = model(ids, use_cache=True, logits_to_keep=1)
        times = []
        for _ in range(TOKENS):
            started_s = time.perf_counter()
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            times.append(time.perf_counter() - started_s)
    return statistics.median(times)


def compare(base: Session, contexts: list[int], rounds: int) -> dict[str, Any]:
    """Alternately predicted and measured."""
    model = base.model().eval()
    predicted: dict[int, list[float]] = {context: [] for context in contexts}
    measured: dict[int, list[float]] = {context: [] for context in contexts}
    for round_number in range(rounds + 1):
        layers, place = measure(base, "cpu")
        for context in contexts:
            taken_s = decoded_s(model, context)
            if round_number:  # the first warms up
                (only,) = placements(layers, [place], context, host_free_bytes=host_free_bytes())
                predicted[context].append(only.token_s)
                measured[context].append(taken_s)
    rows = {}
    for context in contexts:
        ours, truth = Sample(tuple(predicted[context])), Sample(tuple(measured[context]))
        rows[str(context)] = {"predicted_s": ours.median, "measured_s": truth.median}
        print(
            f"{base.url.split(':')[0]}, {context} tokens: predicted {1e3 * ours.median:.1f} ms, "
            f"measured {1e3 * truth.median:.1f} ms: × {ours.median / truth.median:.2f}",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[64, 512, 1024, 1900])
    parser.add_argument("--rounds", type=int, default=3)
    model_options(parser)
    options = parser.parse_args()
    model, title, suffix, serve = chosen_model(options)
    result: dict[str, Any] = {"model": title}
    with executor(model, *serve) as served:
        for url in (served.unix, served.tcp):
            with symbiosis.connect(url) as base:
                result[url.split(":")[0]] = compare(base, options.contexts, options.rounds)
    save("placement" + suffix, result)


if __name__ == "__main__":
    main()
