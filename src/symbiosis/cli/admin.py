"""``symbiosis admin``: what an operator asks a running executor, over its own UNIX socket."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from symbiosis.cli import console

Socket = Annotated[
    str,
    typer.Option("--socket", metavar="URL", help="unix:///path.sock, as given to serve --admin."),
]
Client = Annotated[int, typer.Argument(help="Its number, as `admin status` shows it.")]

app = typer.Typer(
    no_args_is_help=True,
    help="Look after a running executor, over the UNIX socket that `serve --admin` listens on.",
    epilog=console.examples(
        "symbiosis admin status --socket unix:///run/symbiosis/admin.sock",
        "symbiosis admin tenants --socket unix:///run/symbiosis/admin.sock",
        "symbiosis admin disconnect 7 --socket unix:///run/symbiosis/admin.sock",
    ),
)


@app.command()
def status(socket: Socket) -> None:
    """Print every counter, with the clients of all tenants, as JSON."""
    typer.echo(json.dumps(_ask(socket, "status"), indent=2))


@app.command()
def tenants(socket: Socket) -> None:
    """Print what each tenant uses and may use, as JSON."""
    typer.echo(json.dumps(_ask(socket, "tenants")["tenants"], indent=2))


@app.command("reload")
def reload_keys(socket: Socket) -> None:
    """Read the key store now; a malformed one is refused and the old one stays."""
    ended = _ask(socket, "reload")["ended"]
    typer.echo(f"the key store has been read; {ended} sessions ended")


@app.command()
def drain(socket: Socket) -> None:
    """Take no new sessions; those that are there go on."""
    left = _ask(socket, "drain")["sessions"]
    typer.echo(f"no new sessions from now on; {left} go on")


@app.command()
def disconnect(client: Client, socket: Socket) -> None:
    """End one session. Its client may come back: revoke its key to prevent that."""
    _ask(socket, "disconnect", client=client)
    typer.echo(f"client {client} is disconnected")


def _ask(url: str, verb: str, **fields: object) -> dict[str, Any]:
    from symbiosis.transport.sockets import SocketChannel
    from symbiosis.wire.frames import VERSION

    channel = SocketChannel(url, {"protocol": VERSION, "client": "admin"})
    try:
        answer, _ = channel.request({"admin": verb, **fields})
    finally:
        channel.close()
    return answer
