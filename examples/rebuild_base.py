"""Rebuilds a hosted weight from ordinary exchanges: a limit that every client should expect.

    python examples/rebuild_base.py                       # serves base/model and rebuilds from it
    python examples/rebuild_base.py --base unix:///tmp/base.sock --weight NAME --out w.safetensors

An executor answers x with x Wᵀ. That is W itself, asked for a row at a time: I basis vectors give
it exactly, and the activations of any text of somewhat more than I tokens give it by least
squares, in traffic that looks like everybody's. (``--fetch deny`` refuses whole weights in one
request; it cannot refuse this.) Quotas delay it. Host weights that you may share.
"""

from __future__ import annotations

import argparse
import inspect
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import symbiosis
from symbiosis import Executor, Session
from symbiosis.wire.exchange import Op

BASE = Path(__file__).resolve().parent.parent / "base" / "model"
WEIGHT = "model.layers.2.mlp.up_proj.weight"
WINDOW = 256


def by_basis_vectors(session: Session, weight: int, width: int) -> Tensor:
    """W (O, I), bit for bit: each answer to a basis vector is a column."""
    columns = session.exchange(Op.LINEAR, weight, (), (torch.eye(width),))
    return columns.T.contiguous()


def by_ordinary_tokens(x: Tensor, y: Tensor) -> Tensor:
    """W (O, I) from inputs (T, I) and answers (T, O): least squares in fp64."""
    solution: Tensor = torch.linalg.lstsq(x.double(), y.double(), driver="gelsd").solution
    return solution.T


@torch.no_grad()
def overhear(session: Session, module: str, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What goes to one frozen layer, and the answers, while the model reads ``ids`` (rows, T)."""
    heard: list[tuple[Tensor, Tensor]] = []
    model = session.model()
    layer = model.get_submodule(module)
    layer.register_forward_hook(lambda _, x, y: heard.append((x[0].flatten(0, 1), y.flatten(0, 1))))
    for row in ids:
        model(row[None])
    return torch.cat([x for x, _ in heard]), torch.cat([y for _, y in heard])


def relative_error(found: Tensor, truth: Tensor) -> float:
    """By the Frobenius norm."""
    return float((found.double() - truth.double()).norm() / truth.double().norm())


def ordinary_text(session: Session, tokens: int) -> Tensor:
    """(rows, `WINDOW`) ids of Python source code, at least ``tokens`` in all."""
    read = session.tokenizer()(inspect.getsource(argparse), return_tensors="pt")["input_ids"][0]
    rows = -(-tokens // WINDOW)
    windows: Tensor = read[: rows * WINDOW].view(rows, WINDOW)
    return windows


def rebuild(session: Session, name: str, ids: Tensor, out: Path | None) -> dict[str, float]:
    """Both ways; prints and returns the relative errors of the second against the first."""
    info = next((w for w in session.weights.values() if name in w.names), None)
    if info is None or len(info.shape) != 2:
        raise SystemExit(f"{session.url} hosts no matrix {name}; see session.weights for names")
    width = info.shape[1]
    exact = by_basis_vectors(session, info.id, width)
    print(f"{name} {tuple(info.shape)}: {width} basis vectors gave every number")
    if out is not None:
        save_file({name: exact}, out)
    x, y = overhear(session, name.removesuffix(".weight"), ids)
    errors = {}
    for factor in (1.0, 1.25, 1.5, 2.0, 4.0):
        tokens = int(factor * width)
        if tokens <= len(x):
            errors[str(tokens)] = relative_error(by_ordinary_tokens(x[:tokens], y[:tokens]), exact)
            print(f"{tokens:6} ordinary tokens: relative error {errors[str(tokens)]:.1e}")
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", help="an executor's address; by default base/model is served")
    parser.add_argument("--weight", default=WEIGHT)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--out", type=Path, help="a safetensors file to write the weight to")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        executor = None if options.base else Executor.load(str(BASE), dtype=torch.float32)
        url = options.base or f"unix://{folder}/base.sock"
        if executor is not None:
            executor.listen([url])
        try:
            with symbiosis.connect(url) as session:
                ids = ordinary_text(session, options.tokens)
                rebuild(session, options.weight, ids, options.out)
        finally:
            if executor is not None:
                executor.close()


if __name__ == "__main__":
    main()
