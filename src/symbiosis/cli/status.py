"""``symbiosis status``: what an executor is doing, live."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from symbiosis.cli import console
from symbiosis.cli.access import KeyFile, TlsCa, TlsCert, TlsKey, access

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from symbiosis.client.session import Session

Stats = dict[str, Any]


def status(
    base: console.Base,
    once: Annotated[bool, typer.Option("--once", help="Show it once and exit.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object per line instead of a table.")
    ] = False,
    interval: Annotated[
        float, typer.Option(min=0.1, metavar="SECONDS", help="Between two looks.")
    ] = 1.0,
    key_file: KeyFile = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
) -> None:
    """Show an executor's clients, exchanges per second, batch sizes, memory and queue times; with
    a key, those of its tenant."""
    import symbiosis

    key, tls, _ = access(key_file, tls_ca, tls_cert, tls_key)
    with symbiosis.connect(
        base, name="status", retry_s=0, borrow=False, key=key, tls=tls
    ) as session:
        if as_json:
            _print_json(session, once, interval)
        elif once:
            from rich.console import Console

            Console().print(render(_stats(session)))
        else:
            _live(session, interval)


def _stats(session: Session) -> Stats:
    """The executor's counters, without this very client."""
    stats = session.executor_stats()
    stats["clients"].pop(str(session.welcome["session"]), None)
    return stats


def _print_json(session: Session, once: bool, interval: float) -> None:
    while True:
        typer.echo(json.dumps(_stats(session)))
        if once:
            return
        time.sleep(interval)


def _live(session: Session, interval: float) -> None:
    from rich.live import Live

    with Live(render(_stats(session)), auto_refresh=False, screen=False) as live:
        while True:
            time.sleep(interval)
            live.update(render(_stats(session)), refresh=True)


def render(stats: Stats) -> RenderableType:
    """The facts on two lines, and a row per client."""
    from rich.console import Group

    facts = _tenant_facts(stats) if "tenant" in stats else _facts(stats)
    return Group(facts, _clients(stats["clients"]))


def _tenant_facts(stats: Stats) -> str:
    """What an executor with tenants tells each of them."""
    tenant = stats["tenant"]
    return (
        f"{_model(stats)}, policy {stats['policy']}\n"
        f"tenant {tenant['name']}: {tenant['sessions']} sessions, {tenant['rows']:,} rows, "
        f"{tenant['executor_s']:.1f} s of the executor's time"
    )


def _model(stats: Stats) -> str:
    return (
        f"{stats['model']}: {stats['architecture']}, {console.amount(stats['parameters'])} "
        f"parameters in {_numbers(stats)} on {stats['device']}"
    )


def _facts(stats: Stats) -> str:
    sizes = {int(size): count for size, count in stats["batch_sizes"].items()}
    batches = sum(sizes.values())
    mean = sum(size * count for size, count in sizes.items()) / batches if batches else 0.0
    holds = stats.get("holds", 0)
    held = f"{holds:,} held for {1e3 * stats['held_s'] / holds:.2f} ms, " if holds else ""
    return (
        f"{_model(stats)}, policy {stats['policy']}, "
        f"up {console.duration(stats['uptime_s'])}\n"
        f"{stats['exchanges_per_s']:,.1f} exchanges/s, {stats['rows_per_s']:,.0f} rows/s, "
        f"{stats['exchanges']:,} exchanges in {batches:,} batches (mean {mean:.2f}, largest "
        f"{max(sizes, default=0)}), {held}{stats['waiting']} waiting, memory "
        f"{console.size(stats['memory_bytes'])}"
    )


def _numbers(stats: Stats) -> str:
    """How the weights are kept."""
    scheme = stats.get("quantization")
    return f"{scheme} and {stats['dtype']}" if scheme else str(stats["dtype"])


def _clients(clients: dict[str, dict[str, Any]]) -> Table:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(caption=None if clients else "no clients", box=box.SIMPLE)
    table.add_column("client")
    table.add_column("via")
    columns = _columns(clients)
    for title in columns:
        table.add_column(title, justify="right")
    for client in clients.values():
        figures = (show(client) for show in columns.values())
        table.add_row(escape(str(client["name"])), str(client["transport"]), *figures)
    return table


def _columns(clients: dict[str, dict[str, Any]]) -> dict[str, Callable[[dict[str, Any]], str]]:
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "exchanges": lambda client: f"{client['exchanges']:,}",
        "rows": lambda client: console.amount(client["rows"]),
        "batch": lambda client: f"{client['mean_batch']:.2f}",
        "queue ms": lambda client: f"{client['mean_queue_ms']:.2f}",
        "compute s": lambda client: f"{client['compute_s']:.1f}",
        "in": lambda client: console.size(client["bytes_in"]),
        "out": lambda client: console.size(client["bytes_out"]),
    }
    if any(client["lent"] for client in clients.values()):
        columns["weights"] = lambda client: "lent" if client["lent"] else ""
    if any(client["refused"] or client["fetches"] for client in clients.values()):
        columns["refused"] = lambda client: str(client["refused"])
        columns["fetches"] = lambda client: str(client["fetches"])
    return columns
