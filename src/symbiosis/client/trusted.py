"""Anchors from weights that the client trusts: a model folder of its own.

The folder is read once, with transformers; of each hosted weight two small anchors stay, and the
small parameters to compare with what the executor ships. Knows files; knows no channels.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor

from symbiosis.client.integrity import Anchor, anchor_of
from symbiosis.client.welcome import WeightInfo
from symbiosis.errors import IntegrityError, ModelError
from symbiosis.wire.exchange import Op
from symbiosis.wire.frames import Json

logger = logging.getLogger(__name__)


class TrustedFolder:
    """Anchors of every hosted matrix, from ``folder``."""

    def __init__(
        self,
        folder: str,
        welcome: Json,
        weights: Mapping[int, WeightInfo],
        vectors: Mapping[str, int],
    ) -> None:
        """Takes the model's memory while it reads (mapped, where dtypes agree).

        Raises ModelError if the folder cannot be read or is not the model that is hosted.
        """
        if welcome.get("quantization"):
            raise ModelError(
                f"the executor hosts {welcome['model']} in {welcome['quantization']}: its answers "
                f"are not those of the weights in {folder}; verify without weights=, or let it "
                f"host the model dense"
            )
        state, self._computed = _state(folder, welcome)
        self._anchors: dict[tuple[Op, int], Anchor] = {}
        for info in weights.values():
            matrix = _found(state, info.names[0], info.shape, folder)
            if matrix.dim() == 2:
                for op in (Op.LINEAR, Op.MATMUL):
                    self._anchors[op, info.id] = anchor_of(matrix, op)
        hosted = {name for info in weights.values() for name in info.names}
        self._small = {name: t.clone() for name, t in state.items() if name not in hosted}
        self._biases = {
            number: self._small[name] for name, number in vectors.items() if name in self._small
        }

    def anchor(self, op: Op, weight: int) -> Anchor | None:
        return self._anchors.get((Op.LINEAR if op is Op.LINEAR else Op.MATMUL, weight))

    def bias(self, number: int) -> Tensor:
        return self._biases[number]

    def check_shipped(self, shipped: Mapping[str, Tensor]) -> None:
        """Raises IntegrityError if a parameter that the executor ships is not the folder's, or a
        buffer not about what the model's class computes (by another release, perhaps)."""
        for name, value in shipped.items():
            if name in self._small:
                own = self._small[name]
                same = own.dtype == value.dtype and torch.equal(own, value)
            else:
                same = name not in self._computed or _about_equal(self._computed[name], value)
            if not same:
                raise IntegrityError(
                    f"the executor ships other numbers for {name} than the trusted weights have"
                )


def _about_equal(own: Tensor, value: Tensor) -> bool:
    if own.shape != value.shape or own.dtype != value.dtype:
        return False
    return torch.allclose(own.double(), value.double(), rtol=1e-4, equal_nan=True)


def _state(folder: str, welcome: Json) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What is stored, and buffers that are computed while the model is built."""
    cls = getattr(transformers, str(welcome.get("architecture")), None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ModelError(f"transformers has no class {welcome.get('architecture')!r}")
    loader: Any = cls
    try:
        model, report = loader.from_pretrained(
            folder,
            dtype=getattr(torch, str(welcome["dtype"])),
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(f"cannot read trusted weights from {folder!r}: {error}") from error
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"{folder} lacks {len(missing)} weights of a {welcome['architecture']}, for example "
            f"{missing[0]}: it is not the model that is hosted"
        )
    stored = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    computed = {name: b.clone() for name, b in model.named_buffers() if name not in stored}
    return stored, computed


def _found(state: Mapping[str, Tensor], name: str, shape: tuple[int, ...], folder: str) -> Tensor:
    tensor = state.get(name)
    if tensor is None or tuple(tensor.shape) != shape:
        raise ModelError(
            f"{folder} has no {name} of shape {list(shape)}: it is not the model that is hosted"
        )
    return tensor
