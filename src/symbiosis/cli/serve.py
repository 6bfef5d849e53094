"""``symbiosis serve``: host a base model until told to stop."""

from __future__ import annotations

import enum
import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from symbiosis import __version__
from symbiosis.cli import console
from symbiosis.cli.doors import Doors, check, server_tls
from symbiosis.errors import SymbiosisError

if TYPE_CHECKING:
    import torch

    from symbiosis.executor.executor import Executor
    from symbiosis.executor.quantized import Scheme
    from symbiosis.privacy.modes import Bits

DEFAULT_URL = "tcp://127.0.0.1:7420"


class Dtype(enum.StrEnum):
    auto = "auto"
    fastest = "fastest"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Policy(enum.StrEnum):
    align = "align"
    greedy = "greedy"
    lockstep = "lockstep"
    none = "none"


class Fetch(enum.StrEnum):
    allow = "allow"
    deny = "deny"


class Masked(enum.StrEnum):
    eight = "8"
    sixteen = "16"


class Kernels(enum.StrEnum):
    exact = "exact"
    fastest = "fastest"


class Quantize(enum.StrEnum):
    none = "none"
    int8 = "int8"
    nf4 = "nf4"


def serve(
    model: Annotated[str, typer.Argument(help="A transformers model folder, or a hub id.")],
    listen: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL",
            help="unix:///path.sock, tcp://host:port or tls://host:port (port 0: any free one); "
            "may be repeated.",
            show_default=DEFAULT_URL,
        ),
    ] = None,
    dtype: Annotated[
        Dtype,
        typer.Option(
            help="What is computed in. auto: what the model's files say. fastest: that or float32, "
            "whichever is measured to be faster here for this model."
        ),
    ] = Dtype.auto,
    kernels: Annotated[
        Kernels,
        typer.Option(
            help="How float32 products are computed on the CPU. exact: a lone client's as plain "
            "torch does, to the last bit. fastest: by what is measured to be fastest here, which "
            "may be several times as fast and differs in the last bits. Joined rows of several "
            "clients always take the fastest."
        ),
    ] = Kernels.exact,
    device: Annotated[
        str, typer.Option(metavar="cpu|cuda", help="Where the frozen weights are.")
    ] = "cpu",
    quantize: Annotated[
        Quantize,
        typer.Option(
            help="Keep the matrices of the linear layers in 8 bits (int8) or 4 (nf4, as in QLoRA); "
            "embeddings, head and experts stay dense. Needs torchao. Less memory, more time, "
            "slightly other answers."
        ),
    ] = Quantize.none,
    policy: Annotated[
        Policy,
        typer.Option(
            help="How exchanges are batched. align: decoders are held for a bounded time so that "
            "they go through the layers together, and training runs in pieces between them; "
            "greedy: what waits for the same weight goes together, nobody waits for anybody; "
            "lockstep: everybody waits for everybody; none: one by one."
        ),
    ] = Policy.align,
    training_share: Annotated[
        float,
        typer.Option(
            min=0.0, max=0.99, help="Time that fine-tuning is owed while people wait for answers."
        ),
    ] = 0.2,
    fetch: Annotated[
        Fetch,
        typer.Option(
            help="Whether clients may read whole weights, which DoRA, merging and a few other "
            "methods need."
        ),
    ] = Fetch.allow,
    masked: Annotated[
        list[Masked] | None,
        typer.Option(
            help="Offer masked exchanges (--privacy of the clients), and help with the masks of "
            "another executor's clients. 8: with weights of 8 bits, modulo 2^32; 16: modulo 2^48, "
            "near fp32. Keeps such a copy of the matrices. May be repeated.",
            show_default="none",
        ),
    ] = None,
    lend: Annotated[
        bool,
        typer.Option(
            "--lend",
            help="Lend the weights to clients of unix:// addresses: they map the same memory, "
            "read-only, and compute with it themselves, about as fast as a process with the whole "
            "model. For clients that may read all weights (--fetch). On a GPU, for clients on the "
            "same one; there they could also write to it, so not with --keys.",
        ),
    ] = False,
    threads: console.Threads = None,
    supervise: Annotated[
        bool,
        typer.Option(
            "--supervise",
            help="Start the executor again when it crashes; clients carry on. On the CPU a parent "
            "process keeps the weights, and a new executor is there within milliseconds.",
        ),
    ] = False,
    allow_remote: Annotated[
        bool,
        typer.Option(
            "--allow-remote",
            help="Take away the check that addresses which other machines can reach are tls:// "
            "and ask for a key or a certificate. Over tcp:// whoever is on the way reads all "
            "activations and, unless --keys, whoever reaches the port uses the model, sees its "
            "clients and copies its weights. Only for networks where everybody may.",
        ),
    ] = False,
    keys: Annotated[
        Path | None,
        typer.Option(
            help="The key store: every client of whatever address has to show a key that is in "
            "it, or a certificate that names one of its tenants. See `symbiosis keys --help`.",
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option(help="PEM file of the certificate (and chain) for tls:// addresses."),
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(help="Its private key, if that is not in the same file.")
    ] = None,
    tls_client_ca: Annotated[
        Path | None,
        typer.Option(
            help="Mutual TLS: clients of tls:// addresses have to show a certificate from one of "
            "the authorities in this PEM file. Without --keys, its name is its tenant's.",
        ),
    ] = None,
    admin: Annotated[
        str | None,
        typer.Option(metavar="URL", help="unix:///path.sock where `symbiosis admin` is answered."),
    ] = None,
    max_clients: Annotated[
        int, typer.Option(min=1, help="Sessions of all tenants at a time; more are refused.")
    ] = 1024,
    exchange_memory: Annotated[
        float,
        typer.Option(
            min=0.01,
            metavar="GB",
            help="For what all clients send and are answered at a time; beyond it they wait.",
        ),
    ] = 4.0,
) -> None:
    """Host a base model: its frozen weights, once, for any number of clients.

    Prints what is hosted and where, then "ready". SIGTERM or Ctrl-C ends it after what is
    queued has been answered.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    console.quiet_libraries()
    from symbiosis.executor.bounds import Bounds
    from symbiosis.executor.executor import Executor
    from symbiosis.jobs.hosted import check_device

    console.set_threads(threads)
    urls = listen or [DEFAULT_URL]
    doors = Doors(urls, server_tls(tls_cert, tls_key, tls_client_ca), allow_remote, admin)
    check(doors, keys)
    if not supervise or not device.startswith("cuda"):
        check_device(device, "--device")  # to count GPUs may begin CUDA, which no fork survives
    if supervise and lend and device.startswith("cuda"):
        raise typer.BadParameter(
            "on a GPU the memory that is lent goes with the executor, so that its borrowers cannot "
            "carry on with the next one: leave out --supervise or --lend",
            param_hint="--lend",
        )
    if supervise and dtype is Dtype.fastest:
        raise typer.BadParameter(
            "fastest is measured when an executor starts, and one that is started again must host "
            "the same: start it once without --supervise, and give the dtype that it says",
            param_hint="--dtype",
        )
    typer.echo(f"symbiosis {__version__}: loading {model}")
    load = functools.partial(
        Executor.load,
        name_of(model),
        dtype=torch_dtype(dtype),
        device=device,
        quantize=scheme_of(quantize),
        policy=policy.value,
        training_share=training_share,
        fetch=fetch.value,
        masked=_bits(masked or []),
        lend=lend,
        keys=keys,
        bounds=Bounds(connections=max_clients, memory_bytes=int(exchange_memory * 1e9)),
        kernels=kernels.value,
    )
    terms = f"{policy}, training share {training_share:g}, fetch {fetch}"
    if supervise:
        raise typer.Exit(_supervise(load, doors, device, terms))
    with load() as executor:
        taken = doors.open(executor)
        _announce(executor, taken, terms)
        executor.wait()
    raise SymbiosisError(_STOPPED)


_STOPPED = "the executor stopped by itself; its log above says why"


def _supervise(load: Callable[[], Executor], doors: Doors, device: str, terms: str) -> int:
    """Load (on the CPU) and listen here, and serve in children; the exit code."""
    from symbiosis.cli.supervisor import Supervisor
    from symbiosis.jobs.hosted import check_device
    from symbiosis.transport.addresses import Address, listen

    loaded = None if device.startswith("cuda") else load()  # CUDA does not survive a fork
    if loaded is not None:
        loaded.digest.wait()  # once, and by threads that a fork would lose
    listeners = [listen(Address.parse(url)) for url in doors.urls]
    for listener, _ in listeners:
        listener.setblocking(False)

    def work(ready: Callable[[], None], again: bool) -> None:
        check_device(device, "--device")
        with loaded or load() as executor:
            taken = doors.open(executor, listeners)
            ready()
            if not again:
                _announce(executor, taken, terms)
            executor.wait()
        raise SymbiosisError(_STOPPED)

    try:
        return Supervisor(work).run()
    finally:
        for listener, address in listeners:
            listener.close()
            if address.path is not None:
                os.unlink(address.path)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """Ends the command in order; a second signal ends it at once."""
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_DFL)
    raise SystemExit(0)


def name_of(model: str) -> str:
    """A folder by its absolute path: clients write it into their adapters."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def scheme_of(quantize: Quantize) -> Scheme | None:
    match quantize:
        case Quantize.int8:
            return "int8"
        case Quantize.nf4:
            return "nf4"
    return None


def _bits(masked: list[Masked]) -> tuple[Bits, ...]:
    found: dict[Masked, Bits] = {Masked.eight: 8, Masked.sixteen: 16}
    return tuple(found[each] for each in dict.fromkeys(masked))


def torch_dtype(dtype: Dtype) -> torch.dtype | Literal["fastest"] | None:
    import torch

    match dtype:
        case Dtype.auto:
            return None
        case Dtype.fastest:
            return "fastest"
    found = getattr(torch, dtype.value)
    assert isinstance(found, torch.dtype)
    return found


def _announce(executor: Executor, urls: list[str], policy: str) -> None:
    facts = executor.describe()
    weights = f"{console.amount(_number(facts['parameters']))} parameters"
    scheme = f"{facts['quantization']} and " if facts["quantization"] else ""
    size = f"{console.size(_number(facts['bytes']))} in {scheme}{facts['dtype']}"
    lines = {
        "model": facts["model"],
        "architecture": facts["architecture"],
        "weights": f"{weights}, {size}",
        "device": facts["device"],
        "kernels": facts["kernels"],
        "policy": policy,
        "pid": facts["pid"],
    }
    for key, value in lines.items():
        typer.echo(f"{key:<13}{value}")
    for url in urls:
        typer.echo(f"{'listening':<13}{url}")
    typer.echo("ready")


def _number(value: object) -> float:
    assert isinstance(value, (int, float))
    return value
