"""Builds a transformers model whose frozen parameters are remote weights.

The model is constructed on the meta device from the executor's configuration, so that nothing
is allocated; then each parameter becomes a remote weight, and norms, biases and buffers get the
values that the executor ships. Parameters that the executor does not have (the head of another
task) are initialised here as transformers does. No model-specific code.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel

from symbiosis.client.remote_weight import RemoteWeight
from symbiosis.client.session import Session
from symbiosis.client.welcome import WeightInfo
from symbiosis.errors import ModelError

logger = logging.getLogger(__name__)


def build_model(
    session: Session, auto_class: Any, device: torch.device, dtype: torch.dtype | None
) -> PreTrainedModel:
    """See `Session.model`."""
    folder = session.model_folder()
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    dtype = dtype or getattr(torch, str(session.welcome["dtype"]))
    model = _on_meta(_class_for(session, config, auto_class), config, dtype)
    filler = _Filler(session, model, device, dtype)
    filler.fill()
    model.name_or_path = model.config.name_or_path = str(session.welcome["model"])
    if model.can_generate() and (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.eval()
    return model


def _class_for(session: Session, config: PreTrainedConfig, auto_class: Any) -> Any:
    hosted = getattr(transformers, str(session.welcome["architecture"]), None)
    if auto_class is None:
        if hosted is None:
            raise ModelError(
                f"the executor hosts a {session.welcome['architecture']}, which transformers "
                f"{transformers.__version__} does not have: use the executor's release"
            )
        return hosted
    mapping = getattr(auto_class, "_model_mapping", None)
    if mapping is None:
        return auto_class
    if type(config) not in mapping:
        raise ModelError(
            f"{auto_class.__name__} has no class for {config.model_type!r}; the executor hosts a "
            f"{session.welcome['architecture']}"
        )
    found = mapping[type(config)]
    return found[0] if isinstance(found, (list, tuple)) else found


def _on_meta(cls: Any, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    with torch.device("meta"), _linspace_on_cpu():
        model: PreTrainedModel = cls._from_config(config, dtype=dtype)
    return model


@contextlib.contextmanager
def _linspace_on_cpu() -> Iterator[None]:
    """Models compute drop-path schedules with ``linspace(...).item()`` while being built."""
    from transformers import initialization

    guard = getattr(initialization, "meta_device_safe_creation_ops", contextlib.nullcontext)
    with guard():
        yield


class _Filler:
    """Gives each meta tensor of a fresh model its real or remote counterpart."""

    def __init__(
        self, session: Session, model: PreTrainedModel, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._session = session
        self._model = model
        self._device = device
        self._dtype = dtype
        self._hosted_dtype = getattr(torch, str(session.welcome["dtype"]))
        self._weights = {name: w for w in session.weights.values() for name in w.names}
        self._shipped = session.shipped()
        self._rename = _renaming(model, {*self._weights, *self._shipped})
        self._made: dict[int, nn.Parameter] = {}  # by id of the meta parameter: keeps ties

    def fill(self) -> None:
        missing = [name for path, m in self._model.named_modules() for name in self._fill(path, m)]
        if not missing:
            return
        logger.warning("not hosted, initialised here and trainable: %s", ", ".join(missing))
        for module in self._model.modules():
            own = module.parameters(recurse=False)
            module._is_hf_initialized = not any(p.requires_grad for p in own)
        self._model.initialize_weights()

    def _fill(self, path: str, module: nn.Module) -> Iterator[str]:
        prefix = f"{path}." if path else ""
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                made = self._parameter(prefix + name, parameter)
                module._parameters[name] = made
                if made.requires_grad:
                    yield prefix + name
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = self._plain(prefix + name, buffer)
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor) and value.device.type == "meta":
                setattr(module, name, self._plain(prefix + name, value))

    def _parameter(self, name: str, meta: nn.Parameter) -> nn.Parameter:
        if id(meta) not in self._made:
            self._made[id(meta)] = self._make(self._rename(name), meta)
        return self._made[id(meta)]

    def _make(self, name: str, meta: nn.Parameter) -> nn.Parameter:
        info = self._weights.get(name)
        if info is not None and info.shape == tuple(meta.shape):
            return self._remote(info, meta)
        value = self._shipped.get(name)
        if value is not None and value.shape == meta.shape:
            # What the executor keeps in another dtype than the model's, it keeps on purpose.
            dtype = self._dtype if value.dtype == self._hosted_dtype else value.dtype
            parameter = nn.Parameter(value.to(self._device, dtype), requires_grad=False)
            if (vector := self._session.vectors.get(name)) is not None:
                original = value.clone()
                parameter.symbiosis_vector = (vector, self._session, original)  # type: ignore[attr-defined]
        else:
            parameter = nn.Parameter(torch.empty_like(meta, device=self._device))
        parameter._is_hf_initialized = not parameter.requires_grad  # type: ignore[attr-defined]
        return parameter

    def _remote(self, info: WeightInfo, meta: nn.Parameter) -> nn.Parameter:
        like = torch.empty(info.shape, dtype=meta.dtype, device="meta")
        weight = RemoteWeight(self._session, info.id, (), like, self._device)
        weight._is_param = True
        weight._is_hf_initialized = True  # type: ignore[attr-defined]
        return weight  # type: ignore[return-value]

    def _plain(self, name: str, meta: Tensor) -> Tensor:
        value = self._shipped.get(self._rename(name))
        if value is None:
            if meta.device.type != "meta":
                return meta.to(self._device)
            raise ModelError(f"the executor ships no value for the buffer {name}")
        return value.to(self._device)


def _renaming(model: PreTrainedModel, hosted: set[str]) -> Any:
    """How this model's names map to the hosted ones: another head may add or drop the prefix."""
    names = [name for name, _ in model.named_parameters()]
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    candidates = [
        lambda name: name,
        lambda name: prefix + name,
        lambda name: name.removeprefix(prefix),
    ]
    return max(candidates, key=lambda rename: sum(rename(name) in hosted for name in names))
