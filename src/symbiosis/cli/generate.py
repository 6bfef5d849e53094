"""``symbiosis generate``: answer prompts with the base model and adapters."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from symbiosis.cli import console
from symbiosis.cli.access import Access, KeyFile, TlsCa, TlsCert, TlsKey, access
from symbiosis.jobs.spec import GenerateSpec

if TYPE_CHECKING:
    from symbiosis.jobs.generate import Answer, Piece


def generate(
    base: console.Base,
    prompt: Annotated[
        list[str], typer.Option(help="What to go on from; - reads it from stdin; may be repeated.")
    ],
    adapter: Annotated[
        list[Path] | None,
        typer.Option(help="An adapter's folder; may be repeated. Without: the base by itself."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Where answers end at the latest.")] = 128,
    sampling: Annotated[
        bool | None,
        typer.Option(
            "--sampling/--greedy",
            help="Draw tokens by their probability, or take the likeliest.",
            show_default="--greedy, unless one of the next three is given",
        ),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Below 1 sharper, above 1 flatter.", show_default="1")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from this much probability.", show_default="1")
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(help="Draw from this many likeliest tokens.", show_default="no limit"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Wrap prompts in the tokenizer's chat template.")
    ] = False,
    expect_digest: console.ExpectDigest = None,
    verify: console.Verify = 0.0,
    verify_weights: console.VerifyWeights = None,
    name: console.Name = None,
    device: console.Device = "cpu",
    privacy: console.PrivacyMode = "plain",
    privacy_helper: console.PrivacyHelper = None,
    privacy_helper_key_file: console.PrivacyHelperKey = None,
    privacy_bits: console.PrivacyBits = 8,
    privacy_weights: console.PrivacyWeights = None,
    threads: console.Threads = None,
    key_file: KeyFile = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
) -> None:
    """Answer every prompt with every adapter; the text streams to stdout, figures to stderr."""
    chosen = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    chosen = {key: value for key, value in chosen.items() if value is not None}
    if sampling is False and chosen:
        raise typer.BadParameter(f"--greedy takes no {', '.join(chosen)}")
    try:
        spec = GenerateSpec.from_mapping(
            {
                "base": base,
                "prompts": tuple(sys.stdin.read().rstrip("\n") if p == "-" else p for p in prompt),
                "adapters": tuple(adapter or ()),
                "max_new_tokens": max_new_tokens,
                "sampling": bool(chosen) if sampling is None else sampling,
                **chosen,
                "seed": seed,
                "chat": chat,
                "expect_digest": expect_digest,
                "verify": verify,
                "verify_weights": verify_weights,
                "name": name,
                "device": device,
                "privacy": privacy,
                "privacy_helper": privacy_helper,
                "privacy_bits": privacy_bits,
                "privacy_weights": privacy_weights,
            }
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    _run(spec, threads, access(key_file, tls_ca, tls_cert, tls_key, privacy_helper_key_file))


def _run(spec: GenerateSpec, threads: int | None, allowed: Access) -> None:
    console.quiet_libraries()
    from symbiosis.jobs import generate as job

    console.set_threads(threads)
    labelled = len(spec.prompts) > 1 or len(spec.adapters) > 1
    for answer in job.run(spec, _writer(labelled), **allowed._asdict()):
        typer.echo(_figures(answer), err=True)


def _writer(labelled: bool) -> Callable[[Piece], None]:
    """Text as it comes; a line with the adapter's name goes before each of several answers."""
    began: set[tuple[str, int]] = set()

    def write(piece: Piece) -> None:
        answer = (piece.adapter, piece.prompt)
        if labelled and answer not in began:
            began.add(answer)
            typer.echo(f"--- {piece.adapter}, prompt {piece.prompt + 1}")
        typer.echo(piece.text, nl=piece.end)
        sys.stdout.flush()

    return write


def _figures(answer: Answer) -> str:
    return f"{answer.adapter}: {answer.tokens} tokens, {answer.tokens_per_s:.1f} tokens/s"
