"""``symbiosis place``: where a client should run, and where its cache should lie."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from symbiosis.cli import console
from symbiosis.cli.access import KeyFile, TlsCa, TlsCert, TlsKey, access

if TYPE_CHECKING:
    from symbiosis.jobs.placement import Option


def place(
    base: console.Base,
    context: Annotated[
        int, typer.Option(min=1, metavar="TOKENS", help="How long a sequence will get.")
    ],
    batch: Annotated[int, typer.Option(min=1, help="Sequences that are decoded at once.")] = 1,
    adapter: Annotated[
        Path | None, typer.Option(help="A folder with the adapter; without it, the base by itself.")
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(
            metavar="cpu|cuda:N",
            help="To look at; may be repeated.",
            show_default="every one of this host",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
    key_file: KeyFile = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
) -> None:
    """Say where a decoding client with a long context is fastest: which device of this host, and
    whether its cache of keys and values should lie there or in host memory.

    Decodes some real tokens on each device, with a short and a long cache, and works out the rest.
    For another host, run it there.
    """
    console.quiet_libraries()
    import symbiosis
    from symbiosis.jobs.measuring import devices, host_free_bytes, measure
    from symbiosis.jobs.placement import options

    known = devices()
    for name in device or ():
        if name not in known:
            raise typer.BadParameter(f"there is no {name} here; choose from {', '.join(known)}")
    key, tls, _ = access(key_file, tls_ca, tls_cert, tls_key)
    with symbiosis.connect(base, name="place", borrow=False, key=key, tls=tls) as session:
        measured = [measure(session, n, batch=batch, adapter=adapter) for n in device or known]
    layers, places = measured[0][0], [place for _, place in measured]
    found = options(layers, places, context, batch, host_free_bytes=host_free_bytes())
    if as_json:
        rows = [
            {**dataclasses.asdict(o), "token_s": o.token_s, "bound": o.bound, "fits": o.fits}
            for o in found
        ]
        typer.echo(json.dumps({"context": context, "batch": batch, "options": rows}))
    else:
        _show(found, context, batch)


def _show(found: list[Option], context: int, batch: int) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    for title in ("client", "cache on", "ms/token", "tokens/s", "size", "free", "most of it"):
        table.add_column(title)
    for option in found:
        table.add_row(
            option.device,
            option.cache,
            f"{1e3 * option.token_s:.1f}",
            f"{batch / option.token_s:.1f}",
            console.size(option.cache_bytes),
            console.size(option.free_bytes),
            option.bound if option.fits else "does not fit",
        )
    out = Console()
    out.print(table)
    best = found[0]
    if not best.fits:
        out.print(
            f"Nowhere on this host is there room for a cache of {console.size(best.cache_bytes)}: "
            f"use a shorter context, fewer sequences, a quantised cache, or another host."
        )
        return
    how = " and generate(cache_implementation='offloaded')" if best.cache == "host" else ""
    out.print(f"For {context:,} tokens: base.model(device={best.device!r}){how}.", highlight=False)
