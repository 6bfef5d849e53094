"""``symbiosis digest``: what an executor would say that it hosts."""

from __future__ import annotations

from typing import Annotated

import typer

from symbiosis.cli import console
from symbiosis.cli.serve import Dtype, Quantize, name_of, scheme_of, torch_dtype


def digest(
    model: Annotated[str, typer.Argument(help="A transformers model folder, or a hub id.")],
    dtype: Annotated[Dtype, typer.Option(help="As given to serve.")] = Dtype.auto,
    quantize: Annotated[Quantize, typer.Option(help="As given to serve.")] = Quantize.none,
) -> None:
    """Print the digest of a model folder, 64 hexadecimal digits: of its weights in the dtype that
    they are served in, its configuration and its tokenizer.

    Clients pin it: --expect-digest, or connect(..., expect_digest=...). It needs the memory of
    the model while it runs.
    """
    if dtype is Dtype.fastest:
        raise typer.BadParameter(
            "fastest is measured when the executor starts; give the dtype that it says",
            param_hint="--dtype",
        )
    console.quiet_libraries()
    from symbiosis.executor.digests import ModelDigest
    from symbiosis.executor.weights import Weights

    weights = Weights.load(name_of(model), dtype=torch_dtype(dtype), quantize=scheme_of(quantize))
    typer.echo(ModelDigest(weights).wait())
