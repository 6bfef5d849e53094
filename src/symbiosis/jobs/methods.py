"""PEFT methods by name, and their options: names are checked before anything is built.

Every method of the installed peft is known, by peft's own name in any spelling of case and
dashes, and by a few names in common use. Knows peft's configuration classes; knows no models
but the one a configuration is applied to.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from symbiosis.errors import FetchRefused, MethodError

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

Options = Mapping[str, Any]

ALIASES: dict[str, tuple[str, dict[str, Any]]] = {
    "prefix": ("PREFIX_TUNING", {}),
    "prompt": ("PROMPT_TUNING", {}),
    "prompttuning": ("PROMPT_TUNING", {}),
    "softprompt": ("PROMPT_TUNING", {}),
    "promptencoder": ("P_TUNING", {}),
    "layernorm": ("LN_TUNING", {}),
    "norm": ("LN_TUNING", {}),
    "llamaadapter": ("ADAPTION_PROMPT", {}),
    "dora": ("LORA", {"use_dora": True}),
    "rslora": ("LORA", {"use_rslora": True}),
}
"""Names in common use → peft's name and the options that the name stands for."""

_DEFAULTS: dict[str, dict[str, Any]] = {
    "LORA": {"target_modules": "all-linear"},
    "PREFIX_TUNING": {"num_virtual_tokens": 20},
    "PROMPT_TUNING": {"num_virtual_tokens": 20},
    "P_TUNING": {"num_virtual_tokens": 20},
    "CARTRIDGE": {"num_virtual_tokens": 20},
    "ADAPTION_PROMPT": {"adapter_len": 10, "adapter_layers": 1},
}
"""Where peft demands a choice or chooses for other purposes; the user's options go first."""

_LEARNING_RATES = {
    "IA3": 3e-3,
    "LN_TUNING": 1e-3,
    "PREFIX_TUNING": 1e-2,
    "PROMPT_TUNING": 3e-2,
    "P_TUNING": 1e-3,
    "CARTRIDGE": 1e-2,
    "ADAPTION_PROMPT": 9e-3,
    "VERA": 4e-3,
}
"""In the range of each method's paper: the fewer the parameters, the larger the steps."""

_LEARNING_RATE = 2e-4

_OUT_OF_REACH = {
    "POLY": (
        "it wants a task number with every example, and data sets here have none; in a training "
        "loop of your own, peft runs it on session.model()"
    ),
    "MULTITASK_PROMPT_TUNING": (
        "it wants a task number with every example, and data sets here have none; in a training "
        "loop of your own, peft runs it on session.model()"
    ),
    "XLORA": (
        "it mixes adapters that are trained already; train them with lora, then mix them with "
        "peft on session.model()"
    ),
}
"""Methods of peft that a data set of texts cannot train; they work on a hosted base all the same
(docs/compatibility.md)."""

_OURS = {
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
}
"""Fields of a configuration that say what the run is, and are not the user's to set."""

_BUILD_FAILURES = (ValueError, TypeError, KeyError, AttributeError, ImportError)


@dataclasses.dataclass(frozen=True)
class Method:
    """A method with its options, both known to exist."""

    peft_type: str
    """As in ``adapter_config.json``."""
    options: Options

    @property
    def name(self) -> str:
        """For people: ``lora with use_dora=True``; the choice of variant is part of the name."""
        chosen = [
            f"{key}={value}"
            for key, value in self.options.items()
            if key.startswith(("use_", "init_")) and isinstance(value, (bool, str))
        ]
        return friendly(self.peft_type) + (f" with {', '.join(chosen)}" if chosen else "")

    @property
    def learning_rate(self) -> float:
        """What to use when the user does not say."""
        return _LEARNING_RATES.get(self.peft_type, _LEARNING_RATE)

    def config(self, *, steps: int) -> PeftConfig:
        """peft's configuration object; ``steps`` is the length of the run, which a few methods
        schedule by. Raises MethodError if peft refuses the options."""
        options = dict(self.options)
        if self.peft_type == "ADALORA":
            options.setdefault("total_step", steps)
        return _built(self.peft_type, options)

    def apply(self, model: PreTrainedModel, *, steps: int) -> PeftModel:
        """Wrap ``model``, in place as peft does it. Raises MethodError with peft's reason, and
        FetchRefused if the method reads weights that the executor keeps to itself."""
        from peft import get_peft_model

        try:
            return get_peft_model(model, self.config(steps=steps))
        except FetchRefused as error:
            raise FetchRefused(f"{self.name} cannot be used with this executor: {error}") from error
        except _BUILD_FAILURES as error:
            raise MethodError(
                f"{self.name} cannot be applied to {type(model).__name__}: {error}"
            ) from error


def known_methods() -> list[str]:
    """Every method of the installed peft, as a user would write it."""
    return sorted(friendly(name) for name in _types())


def friendly(peft_type: str) -> str:
    """``PREFIX_TUNING`` → ``prefix-tuning``."""
    return peft_type.lower().replace("_", "-")


def resolve(name: str, options: Options | None = None) -> Method:
    """The method called ``name``, with its defaults and the user's ``options`` on top.

    Raises MethodError for an unknown name, an unknown option or one that peft refuses, and for
    a method that cannot be trained on texts alone.
    """
    peft_type, implied = _find(name)
    if peft_type in _OUT_OF_REACH:
        raise MethodError(f"{friendly(peft_type)} cannot be used: {_OUT_OF_REACH[peft_type]}")
    given = dict(options or {})
    known = option_names(peft_type)
    for key in given:
        if key not in known:
            raise MethodError(_unknown_option(peft_type, key, known))
    merged = {**_DEFAULTS.get(peft_type, {}), **implied, **given}
    method = Method(peft_type, {"task_type": "CAUSAL_LM", **merged})
    method.config(steps=100_000)  # only to hear now what peft refuses; the run makes its own
    return method


def option_names(peft_type: str) -> list[str]:
    """The options of a method, by peft's name for the method."""
    fields = dataclasses.fields(_types()[peft_type])
    return sorted(field.name for field in fields if field.name not in _OURS)


def read_options(assignments: Iterable[str] = (), file: Path | None = None) -> dict[str, Any]:
    """Options from a YAML or JSON file, then from ``key=value`` texts, which win.

    Values are read as YAML: numbers, ``true``, ``[q_proj, v_proj]``. Raises MethodError.
    """
    options = {} if file is None else _read_file(file)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise MethodError(f"{assignment!r} is no option; write key=value, such as r=16")
        try:
            options[key.strip()] = _number(yaml.safe_load(text))
        except yaml.YAMLError as error:
            reason = str(error).splitlines()[0]
            raise MethodError(f"the value of {assignment!r} is not YAML: {reason}") from None
    return {key: _module_list(key, value) for key, value in options.items()}


def _types() -> dict[str, type]:
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    return {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def _find(name: str) -> tuple[str, dict[str, Any]]:
    wanted = _plain(name)
    by_plain_name = {_plain(peft_type): peft_type for peft_type in _types()}
    if wanted in by_plain_name:
        return by_plain_name[wanted], {}
    if wanted in ALIASES:
        return ALIASES[wanted]
    near = difflib.get_close_matches(wanted, [*by_plain_name, *ALIASES], n=1)
    hint = f" Did you mean {friendly(by_plain_name.get(near[0], near[0]))}?" if near else ""
    raise MethodError(f"no PEFT method {name!r}.{hint} Known: {', '.join(known_methods())}")


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _unknown_option(peft_type: str, key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return f"{friendly(peft_type)} has no option {key!r}.{hint} Its options: {', '.join(known)}"


def _built(peft_type: str, options: Options) -> PeftConfig:
    from peft import PeftConfig

    try:
        config = _types()[peft_type](**options)
    except _BUILD_FAILURES as error:
        raise MethodError(f"{friendly(peft_type)} refuses its options: {error}") from error
    assert isinstance(config, PeftConfig)
    return config


def _read_file(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text()
        found = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise MethodError(f"cannot read the options file {file}: {error.strerror}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise MethodError(f"the options file {file} is malformed: {error}") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise MethodError(f"the options file {file} must hold one mapping, option: value")
    return {key: _number(value) for key, value in found.items()}


def _number(value: Any) -> Any:
    """YAML 1.1 takes ``1e-3`` for a text; people do not."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    return value


def _module_list(key: str, value: Any) -> Any:
    """``q_proj,v_proj`` names modules; peft takes a text for a regular expression."""
    names = key.endswith("_modules") or key == "modules_to_save"
    if names and isinstance(value, str) and re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)*", value):
        return [part.strip() for part in value.split(",")]
    return value
