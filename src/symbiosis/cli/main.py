"""The entry point: commands, and how errors end. Knows no torch."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from symbiosis import __version__
from symbiosis.cli import admin, console, keys
from symbiosis.cli.digest import digest
from symbiosis.cli.finetune import finetune
from symbiosis.cli.generate import generate
from symbiosis.cli.place import place
from symbiosis.cli.serve import serve
from symbiosis.cli.status import status
from symbiosis.errors import SymbiosisError

ABOUT = """The base model as a service: one executor hosts the frozen weights, many adapters train \
and answer against it.

Environment: SYMBIOSIS_BASE is the default of --base; SYMBIOSIS_KEY is the API key unless \
--key-file names one; SYMBIOSIS_LOG is debug, info (the default), \
warning or error, and with debug, errors come with their traceback."""

app = typer.Typer(
    name="symbiosis",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog=console.examples(
        "symbiosis serve ./my-llama --listen unix:///tmp/base.sock",
        "symbiosis finetune --base unix:///tmp/base.sock --data train.jsonl --out ./my-adapter",
        "symbiosis generate --base unix:///tmp/base.sock --adapter ./my-adapter --prompt Hello",
        "symbiosis status --base unix:///tmp/base.sock",
    ),
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"symbiosis {__version__}")
        raise typer.Exit


@app.callback(help=ABOUT)
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it and exit.")
    ] = False,
) -> None:
    """What goes before every command."""
    console.configure_logging()
    console.share_cores(context.invoked_subcommand)


SERVE_EXAMPLES = console.examples(
    "symbiosis serve ./my-llama --listen unix:///tmp/base.sock --listen tcp://127.0.0.1:7420",
    "symbiosis serve ./my-llama --dtype float32 --policy lockstep --threads 8",
    "symbiosis serve ./my-llama --device cuda --dtype bfloat16 --fetch deny",
    "symbiosis serve ./my-llama --listen tls://0.0.0.0:7420 --tls-cert cert.pem --tls-key key.pem "
    "--keys keys.json --admin unix:///run/symbiosis/admin.sock",
)
FINETUNE_EXAMPLES = console.examples(
    "symbiosis finetune --base unix:///tmp/base.sock --data train.jsonl --out ./my-adapter",
    "symbiosis finetune ... --peft lora --set r=16 --set target_modules=q_proj,v_proj",
    "symbiosis finetune ... --peft prefix --set num_virtual_tokens=30 --steps 200",
    "symbiosis finetune ... --eval-data held-out.jsonl --eval-steps 50 --save-steps 50",
    "symbiosis finetune ... --resume",
)
GENERATE_EXAMPLES = console.examples(
    "symbiosis generate --base unix:///tmp/base.sock --prompt 'Once upon a time'",
    "symbiosis generate --base unix:///tmp/base.sock --adapter ./a --adapter ./b --prompt Hello",
    "cat question.txt | symbiosis generate --base ... --adapter ./a --prompt - --chat",
    "symbiosis generate --base ... --prompt Hello --temperature 0.7 --top-p 0.9 --seed 1",
)
DIGEST_EXAMPLES = console.examples(
    "symbiosis digest ./my-llama",
    "symbiosis digest ./my-llama --dtype bfloat16 --quantize int8",
)
PLACE_EXAMPLES = console.examples(
    "symbiosis place --base unix:///tmp/base.sock --context 32768",
    "symbiosis place --base tcp://10.0.0.7:7420 --context 8192 --batch 4 --adapter ./my-adapter",
)
STATUS_EXAMPLES = console.examples(
    "symbiosis status --base unix:///tmp/base.sock",
    "symbiosis status --base unix:///tmp/base.sock --once --json",
)

app.command(epilog=SERVE_EXAMPLES, no_args_is_help=True, help=console.help_of(serve))(serve)
app.command(epilog=FINETUNE_EXAMPLES, no_args_is_help=True, help=console.help_of(finetune))(
    finetune
)
app.command(epilog=GENERATE_EXAMPLES, no_args_is_help=True, help=console.help_of(generate))(
    generate
)
app.command(epilog=STATUS_EXAMPLES)(status)
app.command(epilog=PLACE_EXAMPLES, no_args_is_help=True, help=console.help_of(place))(place)
app.add_typer(keys.app, name="keys")
app.add_typer(admin.app, name="admin")
app.command(epilog=DIGEST_EXAMPLES, no_args_is_help=True, help=console.help_of(digest))(digest)


def main() -> None:
    """Run the command line. An error that was foreseen ends in one line and exit code 1,
    misuse in 2, Ctrl-C in 130."""
    try:
        app()
    except (SymbiosisError, OSError) as error:
        if console.debugging():
            raise
        sys.exit(console.fail(error))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
