"""``symbiosis keys``: make, list and revoke the keys of an executor's tenants."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

from symbiosis.cli import console

Store = Annotated[
    Path, typer.Option("--store", help="The key store's file, as given to serve --keys.")
]

app = typer.Typer(
    no_args_is_help=True,
    help="Make, list and revoke the API keys of an executor's tenants. A running executor takes "
    "changes up within a second.",
    epilog=console.examples(
        "symbiosis keys create ann --store keys.json",
        "symbiosis keys list --store keys.json",
        "symbiosis keys revoke 3f9c02ab --store keys.json",
    ),
)


@app.command()
def create(
    tenant: Annotated[str, typer.Argument(help="Whose key; a new tenant has no limits.")],
    store: Store,
    days: Annotated[
        float | None,
        typer.Option(min=0.0, help="How long it is valid.", show_default="until it is revoked"),
    ] = None,
) -> None:
    """Make a key and print it. It is shown this once: the store holds its SHA-256 only."""
    from symbiosis.executor import keystore

    expires = None if days is None else datetime.now(UTC) + timedelta(days=days)
    secret, key = keystore.create(store, tenant, expires)
    typer.echo(f"key {key.id} for {tenant}; it is not shown again", err=True)
    typer.echo(secret)


@app.command("list")
def list_keys(store: Store) -> None:
    """Show ids, tenants and ends of the keys."""
    from symbiosis.executor import keystore

    found = keystore.read(store)
    now = datetime.now(UTC)
    for key in found.keys:
        end = "" if key.is_valid(now) else " (expired)"
        until = "until revoked" if key.expires is None else f"until {key.expires.isoformat()}{end}"
        typer.echo(f"{key.id}  {key.tenant:<20} made {key.created.isoformat()}, {until}")
    without = set(found.tenants) - {key.tenant for key in found.keys}
    for tenant in sorted(without):
        typer.echo(f"{'-':<8}  {tenant:<20} no key")


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As `keys list` shows it.")],
    store: Store,
) -> None:
    """Take a key away. Sessions that came in with it end within a second."""
    from symbiosis.executor import keystore

    key = keystore.revoke(store, key_id)
    typer.echo(f"key {key.id} of {key.tenant} is revoked")
