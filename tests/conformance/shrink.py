"""A tiny configuration of any architecture, made from its class alone.

Starts from what the class declares, not from what it derives, so that derived fields follow the
small ones. Layers are cut to one of each kind. Token ids are moved into the small vocabulary.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from .overrides import OVERRIDES
from .rules import HEAD, LAYERS, UNSET, VOCABULARY, small

_BASE_FIELDS = {field.name for field in dataclasses.fields(PreTrainedConfig)}

_TOKEN = re.compile(r"\w*token_(id|index)")
_FIRST_TOKEN = 100
"""Special tokens have ids from here on; the text of the comparison stays below."""

_DEPTH = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_blocks", "decoder_layers")
_MOST_KINDS = 4


def tiny_config(model_class: type[PreTrainedModel], model_type: str) -> PreTrainedConfig:
    """A small configuration for ``model_class``; raises what transformers does if it cannot be."""
    config_class = CONFIG_MAPPING[model_type]
    start = config_class(**OVERRIDES.get(model_type, {}).get("start", {}))
    fields = _tiny(start)
    _token_ids(fields, _token_names(start))
    return _own_part(config_class(**fields), model_class)


def _own_part(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> PreTrainedConfig:
    """A model type may stand for a larger model, of which ``model_class`` is the text part."""
    wanted = model_class.config_class
    if wanted is None or isinstance(config, wanted):
        return config
    parts = [part for part in vars(config).values() if isinstance(part, wanted)]
    return parts[0] if parts else config


def _tiny(config: PreTrainedConfig) -> dict[str, Any]:
    """What to give to the class of ``config`` for a small one like it."""
    fresh = _fresh(type(config))
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        if field.name in _BASE_FIELDS and not _TOKEN.fullmatch(field.name):
            continue
        value = _declared(field)
        current = vars(config).get(field.name)
        if isinstance(current, PreTrainedConfig):
            fields[field.name] = {**_tiny(current), "model_type": current.model_type}
            continue
        if isinstance(current, dict) and "mrope_section" in current:
            fields[field.name] = _rope(current)
            continue
        if fresh is None or current != vars(fresh).get(field.name):
            value = current
        if value is not None and value is not dataclasses.MISSING:
            fields[field.name] = small(field.name, value)
        elif current is None and field.name in UNSET:
            fields[field.name] = UNSET[field.name]
    _equal_heads(config, fields)
    _cut_layers(config, fields)
    return _merged(fields, OVERRIDES.get(config.model_type, {}).get("fields", {}))


def _fresh(config_class: type[PreTrainedConfig]) -> PreTrainedConfig | None:
    try:
        return config_class()
    except (TypeError, ValueError, StrictDataclassError):
        return None


def _declared(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _equal_heads(config: PreTrainedConfig, fields: dict[str, Any]) -> None:
    """As many key-value heads as heads stay as many."""
    heads = vars(config).get("num_attention_heads")
    if heads is not None and vars(config).get("num_key_value_heads") == heads:
        fields["num_key_value_heads"] = fields["num_attention_heads"]


def _rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Sections of a multimodal rotary embedding fill half a head."""
    sections = parameters["mrope_section"]
    rest = [max(1, HEAD // 2 * size // sum(sections)) for size in sections[1:]]
    return {**parameters, "mrope_section": [HEAD // 2 - sum(rest), *rest]}


def _cut_layers(config: PreTrainedConfig, fields: dict[str, Any]) -> None:
    """Lists with an entry per layer keep one layer of each kind; as many layers there are."""
    depth_field = next((name for name in _DEPTH if isinstance(fields.get(name), int)), None)
    if depth_field is None:
        return
    depth = vars(config)[depth_field]
    known = {field.name for field in dataclasses.fields(config)}
    lists = {
        name: list(value)
        for name, value in vars(config).items()
        if name in known and isinstance(value, (list, tuple)) and len(value) == depth > LAYERS
    }
    if not lists:
        return
    kinds: dict[tuple[str, ...], int] = {}
    for layer, kind in enumerate(zip(*lists.values(), strict=True)):
        kinds.setdefault(tuple(map(str, kind)), layer)
    layers = list(kinds.values())[:_MOST_KINDS]
    layers += [layer for layer in range(depth) if layer not in layers][
        : max(0, LAYERS - len(layers))
    ]
    layers.sort()
    fields[depth_field] = len(layers)
    for name, values in lists.items():
        fields[name] = [small(name, values[layer]) for layer in layers]


def _token_names(config: PreTrainedConfig) -> list[str]:
    names: set[str] = set()
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            names.update(_token_names(value))
        elif _TOKEN.fullmatch(name):
            names.add(name)
    return sorted(names)


def _token_ids(fields: dict[str, Any], names: list[str]) -> None:
    """One id for one name, wherever in the configuration it stands."""
    for name, value in fields.items():
        if isinstance(value, dict):
            _token_ids(value, names)
        elif name in names and type(value) in (int, list) and value not in (0, -1):
            fields[name] = _FIRST_TOKEN + names.index(name) % (VOCABULARY - _FIRST_TOKEN)


def _merged(fields: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    merged = dict(fields)
    for name, value in more.items():
        known = merged.get(name)
        both = isinstance(value, dict) and isinstance(known, dict)
        merged[name] = _merged(known, value) if both else value
    return merged
