"""The frozen weights: loaded once, looked at through view recipes, never changed.

Decides which parameters are *hosted* (they stay here, products with them are exchanges) and
which are *shipped* (norms, biases and other small parameters, and all buffers: a client that
attaches receives them). Knows nothing of connections or scheduling.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from symbiosis.errors import InvalidInput, ModelError, UnknownWeight
from symbiosis.executor import quantized
from symbiosis.executor.fastest import fastest_dtype, fastest_kernels
from symbiosis.executor.model_files import read_model
from symbiosis.executor.quantized import QuantizedMatrix, Scheme
from symbiosis.kernels import TORCH, KernelChoice
from symbiosis.privacy.ring import RingWeight
from symbiosis.transport import device_memory
from symbiosis.transport.lent import Lender
from symbiosis.wire.frames import Json
from symbiosis.wire.tensors import ALIGNMENT
from symbiosis.wire.views import Recipe, look

logger = logging.getLogger(__name__)

LARGE = 1 << 20
"""A parameter of two or more dimensions and this many elements is hosted whoever owns it."""

_PRODUCT_MODULES = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd, Conv1D)

_RELEASES = (("malloc_trim", 0), ("MallocExtension_ReleaseFreeMemory",), ("mi_collect", True))

_CLIENT_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken"}

_CLIENT_FILES = (
    "*config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.tiktoken",
    "spiece.model",
    "sentencepiece*.model",
    "chat_template*",
)
"""What a client needs beside the weights: configuration and tokenizer. With the suffixes above,
never weights and never code."""


@dataclass(frozen=True)
class HostedWeight:
    """One frozen weight; tied parameters are one weight with several names.

    ``tensor`` holds the numbers; of a quantised weight only shape and dtype (on the meta device).
    ``axis`` is where the outputs of a layer lie, if its weight is a matrix that products are
    computed with: 0, of a Conv1D 1. None for lookups, convolutions and experts.
    """

    id: int
    names: tuple[str, ...]
    tensor: torch.Tensor
    quantized: QuantizedMatrix | None = None
    axis: int | None = None

    def dense(self) -> torch.Tensor:
        """The numbers; those of a quantised weight newly made."""
        if self.quantized is None:
            return self.tensor
        return self.quantized.unpack(torch.empty_like(self.tensor, device=self.quantized.device))

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        return self.tensor.nbytes if self.quantized is None else self.quantized.num_bytes


class Weights:
    """The table of hosted weights, and everything else of a model that a client is given.

    Build it with `load` or from a model in memory; afterwards it is read-only and safe to share
    between threads.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        name: str,
        folder: Path | None = None,
        quantize: Scheme | None = None,
        lend: bool = False,
        device: torch.device | None = None,
    ) -> None:
        """Take over the parameters of ``model``; ``folder`` holds its configuration and
        tokenizer files (written from the model when there is none). ``quantize`` keeps the
        matrices of its linear layers in few bits, and empties the model of them. ``lend`` moves
        its dense weights into memory that clients on this host can map, or attach on the same GPU,
        and empties the model of their own. ``device`` is where the weights shall be, by default
        where they are. Raises ModelError."""
        if quantize is not None:
            quantized.check(quantize)
        self.name = name
        self.quantization = quantize
        self.architecture = type(model).__name__
        self._views: dict[tuple[int, Recipe], torch.Tensor] = {}
        self._hosted: dict[int, HostedWeight] = {}
        self._vectors: dict[int, torch.Tensor] = {}
        self.vector_ids: dict[str, int] = {}
        self.shipped: dict[str, torch.Tensor] = {}
        self.ring: dict[int, dict[int, RingWeight]] = {}  # by bits, by id; see `executor.ring`
        self.ring_facts: dict[int, tuple[Json, bytes]] = {}  # what clients are told of them
        self.stored = frozenset(model.state_dict())  # not what is computed while it is built
        self.device = device or next(model.parameters()).device
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self._unpacking = torch.empty(0)
        if lend:
            _check_lending(quantize, self.device)
        self.lender = _lender(model, self.device) if lend else None
        self._take(model)
        if self.lender is not None:
            _seal(self.lender)
        if quantize is not None and all(weight.quantized is None for weight in self):
            raise ModelError(
                f"cannot host {name!r} in {quantize}: it has no linear layer that could be "
                f"quantised; host it without --quantize"
            )
        self.dtype = next(iter(self._hosted.values())).tensor.dtype
        self.for_one = self.for_joined = TORCH  # rows of one client, and of several
        self.files = _read_files(folder) if folder else _written_files(model)

    @classmethod
    def load(
        cls,
        model: str,
        *,
        dtype: torch.dtype | Literal["fastest"] | None = None,
        device: str = "cpu",
        quantize: Scheme | None = None,
        lend: bool = False,
    ) -> Weights:
        """Load a local ``transformers`` folder or a hub id, safetensors only, no remote code.

        ``dtype`` None keeps what the configuration says; "fastest" measures, see `fastest_dtype`.
        Raises ModelError with the reason.
        """
        started = time.monotonic()
        if quantize is not None:
            quantized.check(quantize)
        where = torch.empty(0, device=device).device  # with its number
        if lend:
            _check_lending(quantize, where)
        loaded, folder = read_model(model, None if dtype == "fastest" else dtype)
        if dtype == "fastest" and (chosen := fastest_dtype(loaded, where)) != loaded.dtype:
            del loaded
            loaded, folder = read_model(model, chosen)
        if not lend and quantize is None:  # which move one weight at a time
            loaded = loaded.to(where)
        weights = cls(loaded.eval(), model, folder, quantize, lend, where)
        if quantize is not None or lend:
            del loaded
            _give_memory_back()
        logger.info("loaded %s in %.1f s", model, time.monotonic() - started)
        return weights

    def __iter__(self) -> Iterator[HostedWeight]:
        return iter(self._hosted.values())

    def choose_kernels(self, which: KernelChoice) -> None:
        """Measure which kernels are the fastest, for the joined rows of several clients and, with
        "fastest", for those of one."""
        dense = [w.tensor for w in self if w.quantized is None]
        self.for_joined = fastest_kernels(dense)
        if which == "fastest":
            self.for_one = self.for_joined

    @property
    def num_bytes(self) -> int:
        """Memory of the hosted weights."""
        return sum(w.num_bytes for w in self)

    def __getitem__(self, weight_id: int) -> HostedWeight:
        """Raises UnknownWeight."""
        try:
            return self._hosted[weight_id]
        except KeyError:
            raise UnknownWeight(
                f"weight {weight_id} is not hosted here; {self.name} has weights 1 to "
                f"{len(self._hosted)}"
            ) from None

    def vector(self, vector_id: int) -> torch.Tensor:
        """A shipped one-dimensional parameter (a bias, a norm's weight) by its id, shape (D,);
        raises UnknownWeight."""
        try:
            return self._vectors[vector_id]
        except KeyError:
            raise UnknownWeight(f"vector {vector_id} is not hosted here") from None

    def wait(self) -> None:
        """Until what this thread computes with them on their GPU is there. A kernel's failure shows
        here, as a RuntimeError."""
        device_memory.wait_for_stream(self.device)

    def view(self, weight_id: int, recipe: Recipe) -> torch.Tensor:
        """The weight as the recipe looks at it; raises UnknownWeight, InvalidInput.

        For the thread that computes: of a quantised weight the view lasts until the next call.
        """
        hosted = self[weight_id]
        if hosted.quantized is not None:
            return _looked_at(hosted, self._unpacked(hosted, hosted.quantized), recipe)
        if not recipe:
            return hosted.tensor
        key = (weight_id, recipe)
        found = self._views.get(key)
        if found is None:
            found = _looked_at(hosted, hosted.tensor, recipe)
            if found.untyped_storage().data_ptr() == hosted.tensor.untyped_storage().data_ptr():
                if len(self._views) > 65536:
                    self._views.clear()
                self._views[key] = found
        return found

    def like(self, weight_id: int, recipe: Recipe) -> torch.Tensor:
        """What `view` would return, on the meta device: a shape without cost."""
        found = self._views.get((weight_id, recipe))
        if found is not None:
            return found
        hosted = self[weight_id]
        if not recipe:
            return hosted.tensor
        return _looked_at(hosted, hosted.tensor.to("meta"), recipe)

    def _unpacked(self, hosted: HostedWeight, kept: QuantizedMatrix) -> torch.Tensor:
        """In memory that all quantised weights use in turn: taking new memory for each would
        cost more than the unpacking."""
        size = hosted.tensor.numel()
        if self._unpacking.numel() < size:
            self._unpacking = torch.empty(size, dtype=hosted.tensor.dtype, device=kept.device)
        return kept.unpack(self._unpacking[:size].view(hosted.tensor.shape))

    def shipped_bytes(self) -> bytes:
        """Shipped parameters and buffers as one safetensors file."""
        return save({name: tensor.cpu() for name, tensor in self.shipped.items()})

    def _take(self, model: PreTrainedModel) -> None:
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        for path, module in model.named_modules():
            for name, tensor in _tensors_of(module):
                full = f"{path}.{name}" if path else name
                known = names.get(id(tensor))
                if known is not None and _is_hosted(module, tensor):
                    if known[0] == full:
                        inner = module is not head and len(known) == 1
                        axis = None if id(tensor) in looked_up else _axis(module, tensor)
                        dim = _output_dim(module) if inner else None
                        self._host(tuple(known), tensor, dim, axis)
                else:
                    self._ship(full, tensor)

    def _host(
        self,
        names: tuple[str, ...],
        tensor: torch.Tensor,
        output_dim: int | None,
        axis: int | None,
    ) -> None:
        """``output_dim`` is that of an inner linear layer's matrix, which may be quantised."""
        number = len(self._hosted) + 1
        if self.lender is not None and self.quantization is None:
            data = tensor.data = self.lender.place(number, tensor.detach())
        else:
            data = tensor.detach().to(self.device)
            if data.data_ptr() % ALIGNMENT or not data.is_contiguous():
                data = data.clone(memory_format=torch.contiguous_format)
        hosted = HostedWeight(number, names, data, axis=axis)
        if self.quantization is not None:
            hosted = self._quantized(hosted, output_dim)
            tensor.data = tensor.new_empty(0)  # the model is ours: nobody needs its numbers
            if self.lender is not None and hosted.quantized is None:
                hosted = replace(hosted, tensor=self.lender.place(number, hosted.tensor))
        self._hosted[number] = hosted

    def _quantized(self, hosted: HostedWeight, output_dim: int | None) -> HostedWeight:
        """What is left dense is copied, lest it keep the whole file in memory that it lies in."""
        assert self.quantization is not None
        if output_dim is not None:
            made = quantized.quantize(hosted.tensor, self.quantization, output_dim)
            if made is not None:
                return replace(hosted, tensor=hosted.tensor.to("meta"), quantized=made)
            logger.warning("%s stays dense: it does not fit %s", hosted.names[0], self.quantization)
        return replace(hosted, tensor=hosted.tensor.clone())

    def _ship(self, name: str, tensor: torch.Tensor) -> None:
        data = tensor.detach().to(self.device, copy=True, memory_format=torch.contiguous_format)
        self.shipped[name] = data
        if data.dim() == 1 and data.is_floating_point():
            number = len(self._vectors) + 1
            self._vectors[number] = data
            self.vector_ids[name] = number


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, buffers and plain tensor attributes of one module, without its children."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, parameter
    for name, buffer in module._buffers.items():
        if buffer is not None:
            yield name, buffer
    for name, value in vars(module).items():
        if isinstance(value, torch.Tensor):
            yield name, value


def _is_hosted(module: nn.Module, parameter: torch.Tensor) -> bool:
    if parameter.dim() < 2 or not parameter.is_floating_point():
        return False
    experts = parameter.dim() == 3 and parameter.shape[0] > 1
    return isinstance(module, _PRODUCT_MODULES) or experts or parameter.numel() >= LARGE


def _check_lending(quantize: Scheme | None, device: torch.device) -> None:
    """Raises ModelError."""
    if quantize is not None and device.type != "cpu":
        raise ModelError("on a GPU a quantised base is not lent: leave out --lend or --quantize")


def _lender(model: PreTrainedModel, device: torch.device) -> Lender:
    """Memory for all that may be hosted. Raises ModelError."""
    most_bytes = sum(p.nbytes + device_memory.ALIGNMENT for p in model.parameters())
    try:
        return Lender(most_bytes, _block(most_bytes, device))
    except (OSError, AttributeError, RuntimeError) as error:  # the last: of a device
        raise ModelError(f"this system has no memory to lend weights in: {error}") from None


def _block(num_bytes: int, device: torch.device) -> torch.Tensor | None:
    """None for the CPU, whose memory can be sealed."""
    return None if device.type == "cpu" else device_memory.allocate(num_bytes, device)


def _seal(lender: Lender) -> None:
    """Raises ModelError."""
    try:
        lender.seal()
    except OSError as error:
        raise ModelError(
            f"this system cannot seal memory against writing, which lending needs (Linux 5.1 can): "
            f"{error}; leave out --lend"
        ) from None
    except RuntimeError as error:
        raise ModelError(
            f"this device cannot share its memory with other processes: {error}; leave out --lend"
        ) from None


def _give_memory_back() -> None:
    """The dense model has gone, but the allocator keeps its pages unless it is told not to: that of
    glibc, or tcmalloc or mimalloc if one is preloaded."""
    gc.collect()
    with contextlib.suppress(OSError):
        library = ctypes.CDLL(None)
        for name, *arguments in _RELEASES:
            with contextlib.suppress(AttributeError):
                getattr(library, name)(*arguments)


def _output_dim(module: nn.Module) -> int | None:
    """Along which dimension of its matrix the outputs of a linear layer lie."""
    if isinstance(module, nn.Linear):
        return 0
    return 1 if isinstance(module, Conv1D) else None


def _axis(module: nn.Module, parameter: torch.Tensor) -> int | None:
    """See `HostedWeight`."""
    return None if parameter.dim() != 2 else 1 if isinstance(module, Conv1D) else 0


def _looked_at(hosted: HostedWeight, tensor: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    try:
        return look(tensor, recipe)
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        raise InvalidInput(f"{hosted.names[0]} cannot be looked at that way: {error}") from None


def _read_files(folder: Path) -> dict[str, bytes]:
    found = {path.name: path for pattern in _CLIENT_FILES for path in folder.glob(pattern)}
    return {
        name: path.read_bytes()
        for name, path in sorted(found.items())
        if path.is_file() and path.suffix in _CLIENT_SUFFIXES
    }


def _written_files(model: PreTrainedModel) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        return _read_files(Path(folder))
