"""1 to 64 clients of one executor: what an exchange costs it, and its memory.

Every client has a session of its own and asks for one row of one small product, again and again.
Two things are measured: one client is at work and the others are attached (the time of its
exchange), and all are at work (the executor's processor time per exchange). The clients are threads
of this process, so what they take together is bounded by Python; the executor's figures are its
own. Peer: the same with a single client, in the same run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

import symbiosis
from exchange import TINY
from harness import executor, make_model, pss_bytes, save
from symbiosis.client.session import Session
from symbiosis.client.welcome import weight_table
from symbiosis.wire.exchange import NO_BIAS, Op

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def processor_s(pid: int) -> float:
    """User and system time of a process so far, to a hundredth of a second."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) * _TICK_S


def ask(session: Session, weight: int, x: torch.Tensor) -> None:
    session.product(Op.LINEAR, x, weight, (), NO_BIAS, forward=False)


def alone_us(session: Session, weight: int, x: torch.Tensor, exchanges: int) -> float:
    """The median time of an exchange while the other sessions are silent."""
    times = []
    for _ in range(exchanges):
        started_s = time.perf_counter()
        ask(session, weight, x)
        times.append(time.perf_counter() - started_s)
    return statistics.median(times) * 1e6


def together(
    sessions: list[Session], weight: int, x: torch.Tensor, exchanges: int, pid: int
) -> dict[str, float]:
    """All at work: the executor's processor time per exchange, and exchanges/s."""
    each = exchanges // len(sessions)

    def work(session: Session) -> None:
        for _ in range(each):
            ask(session, weight, x)

    before = [session.stats() for session in sessions]
    threads = [threading.Thread(target=work, args=(session,)) for session in sessions]
    started_s, used_s = time.perf_counter(), processor_s(pid)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed_s, used_s = time.perf_counter() - started_s, processor_s(pid) - used_s
    count = each * len(sessions)
    pairs = [(session.stats(), b) for session, b in zip(sessions, before, strict=True)]
    members = sum(a.mean_batch * a.exchanges - b.mean_batch * b.exchanges for a, b in pairs)
    return {
        "executor_us": used_s / count * 1e6,
        "exchanges_per_s": count / elapsed_s,
        "mean_batch": members / count,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--exchanges", type=int, default=12800)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = make_model("llama-tiny", TINY)
    result: dict[str, Any] = {"exchanges": options.exchanges}
    with executor(model, "--threads", "1") as served, ExitStack() as stack:
        sessions: list[Session] = []
        for count in sorted(options.clients):
            while len(sessions) < count:
                sessions.append(stack.enter_context(symbiosis.connect(served.unix)))
            table = weight_table(sessions[0].welcome).values()
            asked = next(w for w in table if w.names[0].endswith("q_proj.weight"))
            weight, x = asked.id, torch.randn(1, asked.shape[1])
            for session in sessions:  # arenas and tables are there before anything is measured
                ask(session, weight, x)
            alone = statistics.median(
                alone_us(sessions[0], weight, x, 1000) for _ in range(options.rounds)
            )
            runs = [
                together(sessions, weight, x, options.exchanges, served.pid)
                for _ in range(options.rounds)
            ]
            row = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
            row |= {"alone_us": alone, "executor_bytes": pss_bytes([served.pid])}
            result[str(count)] = row
            first = result[str(min(options.clients))]
            print(
                f"{count:3} clients: {row['executor_us']:.0f} µs of the executor per exchange "
                f"(× {row['executor_us'] / first['executor_us']:.2f}), mean batch "
                f"{row['mean_batch']:.2f}, {row['exchanges_per_s']:.0f} exchanges/s; with all but "
                f"one silent {alone:.0f} µs (× {alone / first['alone_us']:.2f}); executor "
                f"{row['executor_bytes'] / 2**20:.0f} MiB "
                f"(× {row['executor_bytes'] / first['executor_bytes']:.2f})",
                flush=True,
            )
    save("scale", result)


if __name__ == "__main__":
    main()
