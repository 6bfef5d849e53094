"""``symbiosis finetune``: train an adapter against a hosted base model."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from symbiosis.cli import console
from symbiosis.cli.access import Access, KeyFile, TlsCa, TlsCert, TlsKey, access
from symbiosis.jobs.spec import SCHEDULERS, FinetuneSpec

if TYPE_CHECKING:
    from symbiosis.jobs.finetune import Report
    from symbiosis.jobs.record import Progress


def finetune(
    base: console.Base,
    data: Annotated[
        Path,
        typer.Option(
            help='JSON lines: {"text"}, or {"prompt", "completion"} (loss on the completion), or '
            '{"messages": \\[{"role", "content"}]}. All are checked before anything starts.'
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="The folder for the adapter, its checkpoints and its records.")
    ],
    peft: Annotated[
        str,
        typer.Option(
            metavar="METHOD",
            help="lora, dora, ia3, prefix, p-tuning, prompt, vera, oft, ... any method of peft; "
            "an unknown one lists them all.",
        ),
    ] = "lora",
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="An option of the method, as peft names it; the value is YAML; may be repeated. "
            "An unknown one lists them all.",
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A YAML or JSON file of options; --set goes over it.")
    ] = None,
    eval_data: Annotated[
        Path | None, typer.Option(help="Held-out JSON lines for the loss before and after.")
    ] = None,
    eval_fraction: Annotated[
        float, typer.Option(help="Without --eval-data: the share of --data to hold out; 0: none.")
    ] = FinetuneSpec.eval_fraction,
    max_length: Annotated[
        int, typer.Option(help="Examples are cut to this many tokens.")
    ] = FinetuneSpec.max_length,
    epochs: Annotated[
        float, typer.Option(help="Passes over the data, unless --steps is given.")
    ] = FinetuneSpec.epochs,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    batch_size: Annotated[
        int, typer.Option(help="Examples that go through the model together.")
    ] = FinetuneSpec.batch_size,
    gradient_accumulation: Annotated[
        int, typer.Option(help="Batches per optimizer step.")
    ] = FinetuneSpec.gradient_accumulation,
    learning_rate: Annotated[
        float | None, typer.Option(help="At its highest.", show_default="the method's own")
    ] = None,
    scheduler: Annotated[
        str, typer.Option(metavar="NAME", help=f"One of {', '.join(SCHEDULERS)}.")
    ] = FinetuneSpec.scheduler,
    warmup_steps: Annotated[
        int, typer.Option(help="Steps in which the learning rate rises.")
    ] = FinetuneSpec.warmup_steps,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = FinetuneSpec.weight_decay,
    max_grad_norm: Annotated[
        float, typer.Option(help="Gradients are clipped to it; 0: never.")
    ] = FinetuneSpec.max_grad_norm,
    seed: Annotated[
        int, typer.Option(help="The same seed gives the same adapter.")
    ] = FinetuneSpec.seed,
    save_steps: Annotated[
        int, typer.Option(help="Steps between checkpoints; 0: none.")
    ] = FinetuneSpec.save_steps,
    eval_steps: Annotated[
        int | None,
        typer.Option(help="Steps between evaluations.", show_default="before and after"),
    ] = None,
    log_steps: Annotated[
        int, typer.Option(help="Steps between records in progress.jsonl.")
    ] = FinetuneSpec.log_steps,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run that --out holds.")
    ] = False,
    expect_model: Annotated[
        str | None, typer.Option(help="Refuse if the executor hosts another model.")
    ] = None,
    expect_digest: console.ExpectDigest = None,
    verify: console.Verify = 0.0,
    verify_weights: console.VerifyWeights = None,
    name: console.Name = None,
    device: console.Device = FinetuneSpec.device,
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
    """Train an adapter: the frozen weights stay with the executor, everything else is here.

    --out receives the adapter as peft loads it, checkpoints, progress.jsonl while it runs, the
    learning curve (curve.csv, curve.png) and run.json with the outcome. An interrupted run goes
    on with --resume and gives the very adapter that it would have given.
    """
    values = dict(locals())
    access_files = "key_file", "privacy_helper_key_file", "tls_ca", "tls_cert", "tls_key"
    for key in ("peft", "option", "config", "threads", *access_files):
        del values[key]
    allowed = access(key_file, tls_ca, tls_cert, tls_key, privacy_helper_key_file)
    _run(values, peft, option or [], config, threads, allowed)


def _run(
    values: dict[str, object],
    method: str,
    assignments: list[str],
    config: Path | None,
    threads: int | None,
    allowed: Access,
) -> None:
    console.quiet_libraries()
    from symbiosis.jobs.methods import read_options

    options = read_options(assignments, config)
    try:
        spec = FinetuneSpec.from_mapping({**values, "method": method, "options": options})
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    from symbiosis.cli.progress import progress_of
    from symbiosis.jobs import finetune as job

    console.set_threads(threads)
    interrupted = _noticed_interrupts()

    def tell(progress: Progress) -> None:
        show(progress)
        if interrupted:
            raise KeyboardInterrupt

    try:
        with progress_of(spec.name or spec.out.name) as show:
            report = job.run(spec, tell, **allowed._asdict())
    except (KeyboardInterrupt, Exception) as error:
        if not interrupted and not isinstance(error, KeyboardInterrupt):
            raise
        if (spec.out / "job.json").is_file() and not (spec.out / "run.json").is_file():
            how = "--resume in place of --overwrite" if spec.overwrite else "--resume"
            typer.echo(f"interrupted; the same command with {how} goes on: {spec.out}", err=True)
        else:
            typer.echo(f"interrupted; there is nothing to resume in {spec.out}", err=True)
        raise typer.Exit(130) from None
    typer.echo(_summary(report, spec.out))


def _summary(report: Report, out: Path) -> str:
    lines = [
        f"{report.method}: {report.trainable_parameters:,} trainable parameters on "
        f"{report.base_model} ({console.amount(report.base_parameters)})",
        f"{report.steps} steps, {report.tokens:,} tokens in {console.duration(report.wall_s)}, "
        f"{report.tokens_per_s:,.0f} tokens/s, {report.exchanges:,} exchanges, mean batch "
        f"{report.mean_batch:.2f}, peak memory {console.size(report.peak_memory_bytes)}",
    ]
    if report.loss_before is not None and report.loss_after is not None:
        lines.append(
            f"held-out loss {report.loss_before:.4f} → {report.loss_after:.4f}"
            + _perplexities(report.perplexity_before, report.perplexity_after)
        )
    return "\n".join([*lines, f"adapter in {out}"])


def _perplexities(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return ""
    return f", perplexity {before:.2f} → {after:.2f}"


def _noticed_interrupts() -> list[int]:
    """Fills with every SIGINT from now on. A KeyboardInterrupt may be swallowed (in a finaliser) or
    come out as another error (in the middle of a file), and is not to be lost."""
    noticed: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        noticed.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    return noticed
