"""The weights that an executor lends to one session, and who else is at work there.

What is lent is computed with here; `symbiosis.client.operations` asks this room what is not. Knows
the table of weights; knows no exchanges.
"""

from __future__ import annotations

import logging
import math
from types import NoneType

import torch
from torch import Tensor
from torch.nn import Parameter

from symbiosis.client.welcome import Identity, WeightInfo
from symbiosis.errors import ModelError
from symbiosis.kernels import TORCH, Kernels
from symbiosis.transport.lent import Lent
from symbiosis.waiting import sleep_at_once

logger = logging.getLogger(__name__)

_WORTH_JOINING = 2 << 20
"""Elements of a model's mean weight, from which decoders gain by sharing the reading: measured,
with 1.2 million (Llama 110M) they do not, with 6.6 million (Llama 1B) they do; decision 20."""


class Borrowed:
    """What a session borrows, for as long as a tensor sees it. May be used from any thread."""

    joins_others = False
    """Do few rows go to the executor all the same, where others' rows join them?"""

    def __init__(
        self,
        lent: Lent,
        weights: dict[int, WeightInfo],
        identity: Identity,
        kernels: Kernels,
    ) -> None:
        """``kernels``: by what the executor would compute."""
        self._kernels = kernels
        self._lent = self._announced = lent
        self._weights = weights
        self._identity = identity
        self._tensors: dict[int, Tensor] = {}
        self._alone: bool | None = None
        self._is_out_of_reach = False

    @property
    def clients(self) -> int:
        """How many are at work there, by what the executor last announced."""
        return self._announced.clients

    def follow(self, lent: Lent | None) -> None:
        """A new connection came with ``lent``, the same weights; it says who is at work. What lies
        in the host's memory is computed with as before, whoever lends now. A device's memory has
        gone with its executor: raises ModelError if it was computed with."""
        if self._lent.is_in_host_memory or (lent is not None and lent.is_same_memory(self._lent)):
            self._announced = lent or self._announced
        elif self._tensors:
            raise ModelError(
                "the executor that had lent its weights on a GPU has ended, and they with it: "
                "connect again and build the model anew"
            )
        elif lent is not None:
            self._lent = self._announced = lent
        else:
            self._is_out_of_reach = True

    def weight(self, number: int, device: torch.device) -> Tensor | None:
        """A weight where it lies in the memory of ``device``, in the executor's dtype, not to be
        changed; None if it is not lent there. Raises ModelError if the digest that was expected has
        another, ProtocolError."""
        if number not in self._lent or self._is_out_of_reach or not self._lent.is_on(device):
            return None
        found = self._tensors.get(number)
        if found is None:
            info = self._weights[number]
            try:
                found = self._lent.tensor(number, info.shape, device)
            except RuntimeError as error:
                logger.warning(
                    "what is lent cannot be attached, so the executor computes: %s", error
                )
                self._is_out_of_reach = True
                return None
            self._identity.check_weight(info.names[0], found)
            self._tensors[number] = found
        return found

    def kernels(self, x: Tensor, bias: Tensor | None = None) -> Kernels:
        """By what a product of ``x`` with a lent weight is computed: as the executor would, where
        nothing else is to be done; torch's also record, cast and vectorise."""
        if not self._kernels.by_onednn or torch.is_grad_enabled():
            return TORCH
        plain = type(x) is Tensor and type(bias) in (NoneType, Tensor, Parameter)
        if not plain or torch.is_autocast_enabled("cpu"):
            return TORCH
        return TORCH if torch._C._functorch.is_functorch_wrapped_tensor(x) else self._kernels

    def begins(self) -> None:
        """A forward pass begins: does anybody else use the cores?

        If so, threads sleep while they wait; and few rows are worth an exchange, where weights are
        so large that reading each once for several clients outweighs it. (In the host's memory; for
        a GPU's nobody has measured that yet.)
        """
        alone = self.clients <= 1
        if alone is not self._alone:
            self._alone = alone
            sizes = [math.prod(info.shape) for info in self._weights.values()]
            large = sum(sizes) >= _WORTH_JOINING * len(sizes)
            self.joins_others = large and not alone and self._lent.is_in_host_memory
        sleep_at_once(not alone)  # each time: other sessions of this process have their say, too
