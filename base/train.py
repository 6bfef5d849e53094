#!/usr/bin/env python3
"""Train the small base model that ships with Symbiosis, from nothing but a Python interpreter.

The text is the running interpreter's own standard library: source files, docstrings, the
language reference that ``help()`` prints, and the licence. No download, no data set. Two CPU
cores and three quarters of an hour are enough:

    python base/train.py --minutes 42 --compile

What comes out, under --out (this script's folder unless told otherwise):

    model/         a LlamaForCausalLM in bfloat16 with its tokenizer and chat template
    curve.csv      step, tokens seen, training loss, held-out loss, seconds
    curve.png      the same, drawn (only where matplotlib is installed)
    results.json   the figures of the finished model

A checkpoint is kept in --work-dir and refreshed every minute; --resume goes on from it.
"""

from __future__ import annotations

import argparse
import ast
import csv
import hashlib
import inspect
import json
import math
import os
import platform
import random
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
USER, ASSISTANT, SYSTEM = "<|user|>", "<|assistant|>", "<|system|>"
SPECIAL_TOKENS = [BOS, EOS, PAD, USER, ASSISTANT, SYSTEM]
SYSTEM_LINE = "You write Python docstrings."

# The {% generation %} markers let trainers find the assistant's tokens (assistant-only loss).
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
<|assistant|>{%- generation -%}{{- message['content'] -}}{{- eos_token -}}{%- endgeneration -%}
{%- elif message['role'] == 'user' -%}
<|user|>{{- message['content'] -}}
{%- elif message['role'] == 'system' -%}
<|system|>{{- message['content'] -}}
{%- else -%}
{{- raise_exception('roles are system, user and assistant, not ' + message['role']) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"""

LEFT_OUT_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "cjkencodings"}
TEST_FOLDERS = {"test", "tests", "idle_test"}
TEST_FILE_CHARS = 16_000  # of each test file only the opening: tests are long and repetitive
HELD_OUT_ONE_IN = 50


# --------------------------------------------------------------------------------------------
# Text
# --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Document:
    name: str
    text: str
    held_out: bool


def is_held_out(name: str) -> bool:
    """Put about 2 % of the names aside; the same names on every machine."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


def cut_at_line(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: text.rfind("\n", 0, limit) + 1]


def is_table(path: Path, text: str) -> bool:
    """Generated tables (character maps, build variables) teach a language model nothing."""
    return "decoding_table" in text or path.name.startswith("_sysconfigdata")


def docstring_chats(source: str) -> str:
    """Turn a module's docstrings into short chats, so that the chat tokens are learnt too."""
    chats: list[str] = []
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            subject = f"def {node.name}({ast.unparse(node.args)})"
        elif isinstance(node, ast.ClassDef):
            subject = f"class {node.name}"
        else:
            continue
        doc = inspect.cleandoc(ast.get_docstring(node) or "")
        if len(doc) < 40 or len(subject) > 200:
            continue
        if len(doc) > 500:
            doc = doc[: max(doc.rfind("\n", 0, 500), 0)].rstrip()
        if doc:
            system = SYSTEM + SYSTEM_LINE if len(chats) % 4 == 0 else ""
            chats.append(f"{system}{USER}{subject}{ASSISTANT}{doc}")
    return f"{EOS}{BOS}".join(chats)


def standard_library(root: Path) -> Iterator[Document]:
    """Every text of the standard library worth reading, in a fixed order."""
    seen: set[bytes] = set()
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(
            name
            for name in subfolders
            if name not in LEFT_OUT_FOLDERS and not name.startswith("config-")
        )
        for name in sorted(names):
            path = Path(folder, name)
            relative = path.relative_to(root)
            if path.suffix not in {".py", ".txt", ".rst"}:
                continue
            in_tests = not TEST_FOLDERS.isdisjoint(relative.parts[:-1])
            if in_tests and path.suffix != ".py":
                continue  # fixtures, not prose
            if relative.parts[0] == "pydoc_data":
                continue  # read below, topic by topic
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            digest = hashlib.sha256(text.encode()).digest()
            if len(text) < 200 or digest in seen or is_table(path, text):
                continue
            seen.add(digest)
            held_out = is_held_out(relative.as_posix())
            if in_tests:
                text = cut_at_line(text, TEST_FILE_CHARS)
            yield Document(relative.as_posix(), text, held_out)
            if path.suffix == ".py" and not in_tests and (chats := docstring_chats(text)):
                yield Document(f"{relative.as_posix()} (docstrings)", chats, held_out)

    from pydoc_data.topics import topics

    for topic, text in sorted(topics.items()):
        name = f"pydoc_data/topics/{topic}"
        yield Document(name, text, is_held_out(name))


# --------------------------------------------------------------------------------------------
# Tokenizer
# --------------------------------------------------------------------------------------------


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every string can be written, digits stay single."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT, SYSTEM],
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save it, with the names in its settings that transformers 4 knows as well as 5."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["additional_special_tokens"] = [USER, ASSISTANT, SYSTEM]
    config.pop("extra_special_tokens", None)
    config.pop("backend", None)
    path.write_text(json.dumps(config, indent=2) + "\n")


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> list[torch.Tensor]:
    """One tensor of token ids per document: bos, the text, eos."""
    texts = [f"{BOS}{d.text}{EOS}" for d in documents]
    encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return [torch.tensor(encoding.ids, dtype=torch.int32) for encoding in encodings]


class Batches:
    """Endless batches of packed sequences; the place reached can be saved and restored."""

    def __init__(self, documents: list[torch.Tensor], rows: int, length: int, seed: int) -> None:
        self.documents, self.rows, self.length, self.seed = documents, rows, length, seed
        self.epoch, self.row = -1, 0
        self.windows = torch.empty(0)

    def start_epoch(self, epoch: int, row: int = 0) -> None:
        """Shuffle the documents, join them, cut at a new offset, shuffle the pieces."""
        rng = random.Random(f"{self.seed}-{epoch}")
        order = list(range(len(self.documents)))
        rng.shuffle(order)
        stream = torch.cat([self.documents[i] for i in order])[rng.randrange(self.length) :]
        windows = stream.unfold(0, self.length + 1, self.length)
        shuffled = list(range(len(windows)))
        rng.shuffle(shuffled)
        self.windows = windows[shuffled]
        self.epoch, self.row = epoch, row

    def next(self) -> torch.Tensor:
        if self.row + self.rows > len(self.windows):
            self.start_epoch(self.epoch + 1)
        batch = self.windows[self.row : self.row + self.rows].long()
        self.row += self.rows
        return batch


# --------------------------------------------------------------------------------------------
# Model
# --------------------------------------------------------------------------------------------


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=1024,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def next_token_loss(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, windows: torch.Tensor, bf16: bool) -> float:
    """Mean loss per token, in nats, over the windows."""
    model.eval()
    total = 0.0
    for chunk in windows.split(16):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            total += next_token_loss(model, chunk.long()).item() * len(chunk)
    model.train()
    return total / len(windows)


def new_optimizer(model: LlamaForCausalLM, lr: float) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices only (not on norms)."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)


def learning_rate(peak: float, step: int, warmup: int, progress: float) -> float:
    """Linear warm-up over the first steps, then a cosine over the whole budget down to 1 %."""
    cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return peak * min(1.0, (step + 1) / warmup) * cosine


# --------------------------------------------------------------------------------------------
# Run
# --------------------------------------------------------------------------------------------


@dataclass
class Progress:
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    epoch: int = 0
    row: int = 0


def save_checkpoint(path: Path, **state: object) -> None:
    """Write beside the file, then rename, so that an interruption never leaves half of one."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def train(
    args: argparse.Namespace,
    model: LlamaForCausalLM,
    batches: Batches,
    held_out: torch.Tensor,
    bf16: bool,
) -> tuple[Progress, list[dict[str, float]]]:
    checkpoint = args.work_dir / "checkpoint.pt"
    optimizer = new_optimizer(model, args.lr)
    progress, curve = Progress(), []
    if args.resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        progress, curve = Progress(**state["progress"]), state["curve"]
        print(f"resumed at step {progress.step}, {progress.seconds:.0f} s", flush=True)
    batches.start_epoch(progress.epoch, progress.row)

    loss_function = torch.compile(next_token_loss) if args.compile else next_token_loss
    budget = args.minutes * 60
    running = torch.zeros(())
    since_eval = 0
    clock = time.monotonic() - progress.seconds
    saved_at = progress.seconds
    model.train()
    while True:
        done = progress.step / args.steps if args.steps else progress.seconds / budget
        finished = done >= 1.0
        if since_eval and (finished or progress.step % args.eval_every == 0):
            row = {
                "step": progress.step,
                "tokens": progress.tokens,
                "train_loss": round(running.item() / since_eval, 4),
                "held_out_loss": round(held_out_loss(model, held_out, bf16), 4),
                "seconds": round(time.monotonic() - clock, 1),
            }
            curve.append(row)
            print(json.dumps(row), flush=True)
            running, since_eval = torch.zeros(()), 0
        if finished or progress.seconds - saved_at > 60:
            saved_at = progress.seconds
            save_checkpoint(
                checkpoint,
                model=model.state_dict(),
                optimizer=optimizer.state_dict(),
                progress=asdict(progress),
                curve=curve,
            )
        if finished:
            return progress, curve

        lr = learning_rate(args.lr, progress.step, args.warmup, done)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = batches.next()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = loss_function(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running += loss.detach()
        since_eval += 1
        progress.step += 1
        progress.tokens += batch[:, 1:].numel()
        progress.epoch, progress.row = batches.epoch, batches.row
        progress.seconds = time.monotonic() - clock


def faster_in_bf16() -> bool:
    """True where the CPU has bfloat16 matrix instructions (AMX or AVX-512 BF16)."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(flags & {"amx_bf16", "avx512_bf16"})


def draw_curve(curve: list[dict[str, float]], path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no curve.png", flush=True)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    tokens = [row["tokens"] / 1e6 for row in curve]
    axes.plot(tokens, [row["train_loss"] for row in curve], label="training", alpha=0.6)
    axes.plot(tokens, [row["held_out_loss"] for row in curve], label="held-out files")
    axes.set(xlabel="tokens seen (millions)", ylabel="loss (nats per token)")
    axes.set_title("Base model, trained on the Python standard library")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path(__file__).resolve().parent, help="where results go")
    add(
        "--work-dir",
        type=Path,
        default=Path(tempfile.gettempdir(), "symbiosis-base"),
        help="where the checkpoint goes; keep it outside the repository (default: %(default)s)",
    )
    add("--minutes", type=float, default=42.0, help="time budget (default: %(default)s)")
    add("--steps", type=int, default=0, help="train this many steps instead of --minutes")
    add("--resume", action="store_true", help="go on from the checkpoint in --work-dir")
    add("--lr", type=float, default=2e-3, help="peak learning rate (default: %(default)s)")
    add("--warmup", type=int, default=300, help="warm-up steps (default: %(default)s)")
    add("--rows", type=int, default=8, help="sequences per step (default: %(default)s)")
    add("--length", type=int, default=256, help="tokens per sequence (default: %(default)s)")
    add("--vocab", type=int, default=4096, help="size of the vocabulary (default: %(default)s)")
    add("--eval-every", type=int, default=200, help="steps between evaluations")
    add("--eval-rows", type=int, default=96, help="held-out sequences for the curve")
    add("--threads", type=int, default=os.cpu_count() or 1, help="default: %(default)s")
    add(
        "--precision",
        choices=["auto", "bf16", "fp32"],
        default="auto",
        help="auto: bfloat16 autocast where the CPU has instructions for it",
    )
    add("--compile", action="store_true", help="torch.compile the loss (needs a C++ compiler)")
    add("--seed", type=int, default=0, help="default: %(default)s")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    bf16 = faster_in_bf16() if args.precision == "auto" else args.precision == "bf16"
    args.work_dir.mkdir(parents=True, exist_ok=True)
    model_folder = args.out / "model"

    documents = list(standard_library(Path(sysconfig.get_paths()["stdlib"])))
    train_documents = [d for d in documents if not d.held_out]
    held_out_documents = [d for d in documents if d.held_out]
    tokenizer = train_tokenizer([d.text for d in train_documents], args.vocab)
    train_ids = encode(tokenizer, train_documents)
    held_out_ids = encode(tokenizer, held_out_documents)
    held_out_stream = torch.cat(held_out_ids)
    held_out = held_out_stream.unfold(0, args.length + 1, args.length)
    held_out_bytes = sum(len(d.text.encode()) for d in held_out_documents)
    spread = torch.linspace(0, len(held_out) - 1, min(args.eval_rows, len(held_out))).long()
    sizes = {
        "train_documents": len(train_ids),
        "train_tokens": sum(map(len, train_ids)),
        "train_bytes": sum(len(d.text.encode()) for d in train_documents),
        "held_out_documents": len(held_out_ids),
        "held_out_tokens": len(held_out_stream),
        "held_out_bytes": held_out_bytes,
    }
    print(json.dumps(sizes), flush=True)

    model = new_model(tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {args.threads} threads, bf16: {bf16}", flush=True)
    batches = Batches(train_ids, args.rows, args.length, args.seed)
    progress, curve = train(args, model, batches, held_out[spread], bf16)

    model.to(torch.bfloat16).save_pretrained(model_folder)
    save_tokenizer(tokenizer, model_folder)

    # The figures are those of the files as shipped: read back, computed in float32.
    shipped = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    assert AutoTokenizer.from_pretrained(model_folder)("x = 1")["input_ids"]
    loss = held_out_loss(shipped, held_out, bf16=False)
    tokens_per_byte = len(held_out_stream) / held_out_bytes
    results = {
        "parameters": parameters,
        "steps": progress.step,
        "tokens_seen": progress.tokens,
        "epochs": round(progress.tokens / sizes["train_tokens"], 2),
        "held_out_loss": round(loss, 4),
        "held_out_perplexity": round(math.exp(loss), 3),
        "held_out_bits_per_byte": round(loss / math.log(2) * tokens_per_byte, 4),
        "seconds": round(progress.seconds, 1),
        "tokens_per_second": round(progress.tokens / progress.seconds),
        "threads": args.threads,
        "precision": "bf16 autocast" if bf16 else "fp32",
        "compiled": args.compile,
        "settings": {
            key: getattr(args, key) for key in ("lr", "warmup", "rows", "length", "vocab", "seed")
        },
        "text": sizes,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    with open(args.out / "curve.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(curve[0]))
        writer.writeheader()
        writer.writerows(curve)
    draw_curve(curve, args.out / "curve.png")
    print(json.dumps(results, indent=2), flush=True)


if __name__ == "__main__":
    main()
