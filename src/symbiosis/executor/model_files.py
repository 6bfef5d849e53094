"""Reading a model's files, and saying what is wrong with them. Knows transformers."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import cached_file

from symbiosis.errors import ModelError

logger = logging.getLogger(__name__)

_WRONG_FILES = (
    OSError, ValueError, TypeError, KeyError, AttributeError, AssertionError, RuntimeError,
    ImportError, StrictDataclassError,
)  # fmt: skip
"""What transformers raises over a configuration that makes no sense: whatever comes of it."""


def read_model(name: str, dtype: torch.dtype | None) -> tuple[PreTrainedModel, Path]:
    """The model in a local folder or of a hub id, in evaluation mode on the CPU, and the folder
    with its configuration. Safetensors only, no remote code; ``dtype`` None keeps what the
    configuration says. Raises ModelError with the reason.
    """
    if _is_path(name) and not Path(name).is_dir():
        raise ModelError(f"cannot host {name!r}: there is no such folder")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        _check_dense(config)
        loaded, report = _model_class(config).from_pretrained(
            name,
            config=config,
            dtype=dtype or "auto",
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported, and refused below by name
        )
        config_file = cached_file(name, "config.json")
    except SafetensorError as error:
        raise ModelError(
            f"cannot host {name!r}: a weights file is damaged or was not copied to its end "
            f"({error}); copy the model again"
        ) from error
    except _WRONG_FILES as error:
        raise ModelError(f"cannot host {name!r}: {error}") from error
    _check_complete(name, report)
    return loaded.eval(), Path(str(config_file)).parent


def _check_complete(name: str, report: dict[str, Any]) -> None:
    """Every weight of the model was in the files, and in the shape that the model has."""
    if mismatched := sorted(report["mismatched_keys"]):
        weight, in_files, in_model = mismatched[0]
        raise ModelError(
            f"cannot host {name!r}: {len(mismatched)} of its weights do not have the shapes that "
            f"its config.json says, for example {weight}, which is {list(in_files)} in the files "
            f"and should be {list(in_model)}: the two belong to different models"
        )
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"cannot host {name!r}: its files lack {len(missing)} weights, for example "
            f"{', '.join(missing[:3])}; they would have to be made up"
        )
    if unused := sorted(report["unexpected_keys"]):
        logger.warning(
            "%s: %d weights in its files are not part of the model as its config.json describes "
            "it, for example %s; they are left out",
            name, len(unused), unused[0],
        )  # fmt: skip


def _is_path(name: str) -> bool:
    """A hub id is ``name`` or ``owner/name``."""
    return name.startswith((".", "~", os.sep)) or name.count("/") > 1


def _check_dense(config: transformers.PreTrainedConfig) -> None:
    """Raises ValueError for files that are quantised already."""
    found = getattr(config, "quantization_config", None)
    if found is not None:
        settings = found if isinstance(found, dict) else found.to_dict()
        raise ValueError(
            f"its files are quantised already ({settings.get('quant_method', 'method unknown')}), "
            f"which is not supported; host the original files with --quantize int8 or nf4"
        )


def _model_class(config: transformers.PreTrainedConfig) -> Any:
    """The class that the configuration names, else the causal LM for its model type."""
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    if config.architectures:
        raise ValueError(
            f"transformers {transformers.__version__} has no model class "
            f"{config.architectures[0]!r}, and code that comes with a model is not run"
        )
    return AutoModelForCausalLM
