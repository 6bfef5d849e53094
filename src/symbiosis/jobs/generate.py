"""Generation: answers prompts with the hosted base model and any number of adapters.

Every adapter gets a thin model of its own: norms, biases and the adapter are here, the frozen
weights are the executor's and shared by all, so adapters of different methods never meet in one
model. Knows sessions, transformers and peft; knows no terminal.
"""

from __future__ import annotations

import dataclasses
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import TextStreamer

from symbiosis.client.session import Session
from symbiosis.errors import ModelError, SymbiosisError
from symbiosis.jobs.encode import pad_id
from symbiosis.jobs.hosted import check_device, connected, log_trust, tokenizer_of
from symbiosis.jobs.spec import GenerateSpec
from symbiosis.transport.tls import Tls

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LOAD_FAILURES = (
    RuntimeError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OSError,
    SafetensorError,
)


class Piece(NamedTuple):
    """A bit of an answer, as soon as it is known."""

    adapter: str
    """Name of the adapter's folder, or ``base``."""
    prompt: int
    """Index of the prompt."""
    text: str
    end: bool
    """The answer is complete with this piece."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """One prompt answered with one adapter."""

    adapter: str
    prompt: str
    text: str
    tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


def run(
    spec: GenerateSpec,
    write: Callable[[Piece], None] | None = None,
    *,
    key: str | None = None,
    tls: Tls | None = None,
    helper_key: str | None = None,
) -> list[Answer]:
    """Answer every prompt with every adapter, prompt by prompt; ``write`` gets the text as it
    comes. Every adapter is loaded before the first token. ``key``, ``tls`` and
    ``helper_key`` are as for `symbiosis.connect`.

    Raises ModelError for an adapter that does not fit, ConnectionFailed and the other errors of
    a session.
    """
    for folder in spec.adapters:
        check_adapter_folder(folder)
    check_device(spec.device)
    with connected(spec, "generate", "interactive", key, tls, helper_key) as base:
        tokenizer = tokenizer_of(base)
        prompts = [_encoded(tokenizer, prompt, spec) for prompt in spec.prompts]
        models = _models(base, spec)
        answers = [
            _answer(spec, label, model, tokenizer, index, ids, write or (lambda piece: None))
            for index, ids in enumerate(prompts)
            for label, model in models.items()
        ]
        log_trust(base)
        return answers


def load_adapter(base: Session, folder: Path, device: str = "cpu") -> PreTrainedModel:
    """A model of the session with the adapter in ``folder`` on it, ready to generate.

    Raises ModelError if the adapter was made for another model, saying what does not fit.
    """
    from peft import PeftModel

    check_adapter_folder(folder)
    model = base.model(device=device)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            adapted = PeftModel.from_pretrained(model, str(folder), torch_device=device)
        _check_complete(adapted, folder, [str(warning.message) for warning in caught])
    except SymbiosisError:
        raise
    except _LOAD_FAILURES as error:
        raise _does_not_fit(base, folder, _first_lines(error)) from error
    return adapted.eval()


def check_adapter_folder(folder: Path) -> None:
    """Raises ModelError if ``folder`` holds no adapter in peft's layout."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise ModelError(f"{folder} holds no adapter: {name} is missing")


def _models(base: Session, spec: GenerateSpec) -> dict[str, PreTrainedModel]:
    if not spec.adapters:
        return {"base": base.model(device=spec.device)}
    labels = _labels(spec.adapters)
    return {
        label: load_adapter(base, folder, spec.device)
        for label, folder in zip(labels, spec.adapters, strict=True)
    }


def _labels(folders: tuple[Path, ...]) -> list[str]:
    """Folder names; whole paths where names are not enough to tell them apart."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) == len(names):
        return names
    paths = [str(folder) for folder in folders]
    if len(set(paths)) < len(paths):
        raise ModelError("the same adapter is given twice")
    return paths


def _encoded(tokenizer: PreTrainedTokenizerBase, prompt: str, spec: GenerateSpec) -> Tensor:
    """Token ids (1, T)."""
    if spec.chat:
        if tokenizer.chat_template is None:
            raise ModelError("the hosted model's tokenizer has no chat template")
        message = [{"role": "user", "content": prompt}]
        found = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        ids = list(found["input_ids"])
    else:
        ids = list(tokenizer(prompt)["input_ids"])
        if ids and ids[-1] == tokenizer.eos_token_id:  # some tokenizers end what is to go on
            ids = ids[:-1] or ids
    if not ids:
        raise ModelError(f"the prompt {prompt!r} has no tokens")
    return torch.tensor([ids], device=spec.device)


def _answer(
    spec: GenerateSpec,
    label: str,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    index: int,
    ids: Tensor,
    write: Callable[[Piece], None],
) -> Answer:
    streamer = _Streamer(tokenizer, lambda text, end: write(Piece(label, index, text, end)))
    torch.manual_seed(spec.seed)
    started_s = time.perf_counter()
    with torch.no_grad():
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            streamer=streamer,
            pad_token_id=pad_id(tokenizer),
            max_new_tokens=spec.max_new_tokens,
            **_sampling(spec),
        )
    seconds = time.perf_counter() - started_s
    return Answer(label, spec.prompts[index], streamer.text, streamer.tokens, seconds)


def _sampling(spec: GenerateSpec) -> dict[str, Any]:
    """None overrides what the model's own generation settings say."""
    if not spec.sampling:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {
        "do_sample": True,
        "temperature": spec.temperature,
        "top_p": spec.top_p,
        "top_k": spec.top_k,
    }


class _Streamer(TextStreamer):  # type: ignore[misc]
    """Hands on text where words are complete, and counts tokens."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str, bool], None]
    ) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write
        self._puts = 0
        self.text = ""

    @property
    def tokens(self) -> int:
        """Generated ones; the first that comes is the prompt."""
        return max(0, self._puts - 1)

    def put(self, value: Tensor) -> None:
        self._puts += 1
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        if text or stream_end:
            self._write(text, stream_end)


def _check_complete(adapted: Any, folder: Path, warned: list[str]) -> None:
    """peft only warns of tensors that are missing, and is silent about those left over."""
    from peft import get_peft_model_state_dict

    missing = next((text for text in warned if "missing adapter keys" in text), None)
    if missing is not None:
        raise ValueError(missing)
    if adapted.active_peft_config.is_prompt_learning:
        _check_prompt(adapted)
        return
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        saved = set(file.keys())
    left_over = sorted(saved - set(get_peft_model_state_dict(adapted, save_embedding_layers=False)))
    if left_over:
        raise ValueError(f"{len(left_over)} tensors have no place, {left_over[0]} for one")


def _check_prompt(adapted: Any) -> None:
    """peft builds a learned prompt by what its configuration says, whatever the model is like:
    a configuration without those facts is completed by the model, and compared."""
    from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

    found = adapted.active_peft_config
    in_cache = found.peft_type.value in ("PREFIX_TUNING", "CARTRIDGE")
    kind = PrefixTuningConfig if in_cache else PromptTuningConfig
    bare = kind(task_type="CAUSAL_LM", num_virtual_tokens=1)
    wanted = get_peft_model(adapted.get_base_model(), bare).active_peft_config
    for name in ("token_dim", "num_layers", "num_attention_heads"):
        is_, should_be = getattr(found, name), getattr(wanted, name)
        if is_ != should_be:
            raise ValueError(f"its {name} is {is_}, and the model's is {should_be}")


def _does_not_fit(base: Session, folder: Path, reason: str) -> ModelError:
    try:
        made_for = json.loads((folder / "adapter_config.json").read_text())
        made_for = made_for.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        made_for = None
    return ModelError(
        f"the adapter in {folder} does not fit {base.welcome['model']}, which the executor hosts "
        f"(it was made for {made_for or 'an unnamed model'}): {reason}"
    )


def _first_lines(error: Exception) -> str:
    """torch lists every mismatch on a line; one tells enough."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__
