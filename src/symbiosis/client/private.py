"""A session that hides activations: the same use, other frames.

Stands where a plain session would, below the adapters: products go through masks or noise, the
embedding and a head that is tied to it are computed here, and what has no masked form is refused
before a byte of it is sent. Knows the modes; masks are in `symbiosis.client.masking`.

Shapes: T rows, I in, O out.
"""

from __future__ import annotations

import functools
import re
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from symbiosis.client.masking import HelperProducts, Masking, MaskProducts, ring_facts
from symbiosis.client.noise import Noise
from symbiosis.client.own_weights import OwnWeights
from symbiosis.client.session import Opener, Session
from symbiosis.client.trace import plain
from symbiosis.client.verifying import Trust
from symbiosis.client.welcome import WeightInfo
from symbiosis.errors import InvalidInput, PrivacyError
from symbiosis.privacy.modes import MaskUse, Privacy, PrivacyReport, report_of
from symbiosis.wire.exchange import NO_BIAS, RING_OPS, Op
from symbiosis.wire.views import Recipe, View, look

_TRANSPOSED = {(View.TRANSPOSE, 2, 0, 1), (View.TRANSPOSE, 2, 1, 0)}
_OTHER = {Op.LINEAR: Op.MATMUL, Op.MATMUL: Op.LINEAR}
_RESIDUES = (torch.int32, torch.int16)
_EXPERT = re.compile(r"(^|\.)experts?(\.|$)")


class PrivateSession(Session):
    """See `Session`; `symbiosis.connect` opens it for a privacy mode."""

    def __init__(
        self,
        opener: Opener,
        url: str,
        *,
        privacy: Privacy,
        helper: Opener | None = None,
        **terms: Any,
    ) -> None:
        """``helper`` opens channels to the second executor of ``masked-split``; ``terms`` are
        those of a `Session`. Raises what that does, and PrivacyError."""
        self._privacy = privacy
        self._helper = helper
        bits = privacy.bits if privacy.is_masked else None
        trust: Trust = terms.get("trust", Trust())
        if trust.verify and privacy.is_masked:
            raise ValueError(
                "verify= has no check for masked products yet; expect_digest= pins the model in "
                "every mode"
            )
        super().__init__(opener, url, **terms, masked=bits)
        self.vectors = {}  # a bias that the executor added would not be masked
        self._lookups: dict[int, Tensor] = {}
        self._masking: Masking | None = None
        self._noise: Noise | None = None
        try:
            self._own = OwnWeights(privacy.weights)
            if privacy.is_masked:
                self._masking = self._make_masking(privacy, helper)
            elif privacy.mode == "noise":
                dense = functools.partial(_dense, weakref.ref(self))
                self._noise = Noise(dense, privacy.sigma, privacy.pool)
        except BaseException:
            self._drop_channel()
            raise

    def privacy_report(self) -> PrivacyReport:
        use = MaskUse() if self._masking is None else self._masking.use()
        return report_of(self._privacy, self.stats(), use)

    # The data path

    def product(
        self,
        op: Op,
        x: Tensor,
        weight: int,
        recipe: Recipe,
        bias: int,
        *,
        forward: bool,
        recording: bool = False,
    ) -> Tensor:
        """See `Session.product`. Raises PrivacyError for a weight without a masked form."""
        assert bias == NO_BIAS
        x = plain(x.detach().contiguous())
        if recipe in _TRANSPOSED:
            op, recipe = _OTHER[op], ()
        with self._lock:
            if self._is_local(weight):
                return self._local_product(op, x, weight, recipe)
            if recipe:
                raise self._no_form(op, weight, "looked at in part")
            if self._masking is not None and not self._masking.has(weight):
                raise self._no_form(op, weight)
            if self._privacy.mode != "plain" and _is_expert(self.weights[weight]):
                raise self._no_form(op, weight, "which some tokens alone go to")
            together = self._masking is None or self._masking.shares_input(op, weight)
            if forward and together and not x.is_inference():
                member = (op, weight, (), NO_BIAS)
                return self._ahead.together(member, x, recording, self._send_forward)
            return self._covered(op, (weight,), x, forward, recording)[0]

    def lookup(self, ids: Tensor, weight: int, recipe: Recipe) -> Tensor:
        """See `Session.lookup`; computed here, except in mode ``plain``."""
        if self._privacy.mode == "plain":
            return self._padded_lookup(ids, weight, recipe)
        with self._lock:
            table = look(self._lookup_table(weight), recipe)
        return F.embedding(ids.detach().cpu(), table).to(ids.device)

    def exchange(
        self,
        op: Op,
        weight: int,
        recipe: Recipe,
        tensors: tuple[Tensor, ...],
        *,
        params: tuple[int, ...] = (),
        bias: int = NO_BIAS,
    ) -> Tensor:
        """Only in mode ``plain``: these operations have no masked form."""
        if self._privacy.mode != "plain":
            raise self._no_form(op, weight)
        return super().exchange(op, weight, recipe, tensors, params=params, bias=bias)

    def close(self) -> None:
        """See `Session.close`; masks that were prepared are dropped."""
        self._closing.set()
        if self._masking is not None:
            self._masking.stop()  # who has the lock may wait for a helper
        super().close()
        if self._masking is not None:
            self._masking.close()

    def __reduce__(self) -> Any:
        reopen, args = super().__reduce__()
        terms = {**reopen.keywords, "privacy": self._privacy, "helper": self._helper}
        return functools.partial(PrivateSession, **terms), args

    def _send_forward(
        self,
        op: Op,
        weights: tuple[int, ...],
        biases: tuple[int, ...],
        params: tuple[int, ...],
        tensors: tuple[Tensor, ...],
        recording: bool,
    ) -> tuple[Tensor, ...]:
        return self._covered(op, weights, tensors[0], True, recording)

    def _covered(
        self, op: Op, weights: tuple[int, ...], x: Tensor, forward: bool, recording: bool
    ) -> tuple[Tensor, ...]:
        """Products of ``x`` (..., I), flattened to rows, in the size of their bucket, and under
        the mode's cover."""
        shape, dtype, device = x.shape[:-1], x.dtype, x.device
        if self._privacy.mode != "plain":
            self._check_width(op, weights, x.shape[-1])
        rows = x.reshape(-1, x.shape[-1]).cpu()
        count = rows.shape[0]
        if not count:
            sizes = [self._outputs(op, weight) for weight in weights]
            return tuple(x.new_zeros(*shape, size) for size in sizes)
        if (size := self._privacy.padded(count)) > count:
            rows = F.pad(rows, (0, 0, 0, size - count))
        send = functools.partial(self._send_rows, forward, recording)
        if self._masking is not None:
            found = self._masking.products(self, op, weights, rows, send, recording)
        elif self._noise is not None:
            found = self._noise.products(op, weights, rows, send)
        else:
            found = send(op, weights, rows)
        return tuple(y[:count].to(device, dtype).view(*shape, y.shape[1]) for y in found)

    def _send_rows(
        self, forward: bool, recording: bool, op: Op, weights: tuple[int, ...], rows: Tensor
    ) -> tuple[Tensor, ...]:
        no_biases = (NO_BIAS,) * len(weights)
        return self._exchange(op, weights, no_biases, (), (), (rows,), forward, recording)

    def _exchange(
        self,
        op: Op,
        weights: tuple[int, ...],
        biases: tuple[int, ...],
        recipe: Recipe,
        params: tuple[int, ...],
        tensors: tuple[Tensor, ...],
        forward: bool,
        recording: bool,
    ) -> tuple[Tensor, ...]:
        """The one way out: on a masked session nothing passes but residues."""
        masked = self._privacy.is_masked
        if masked and (op not in RING_OPS or any(t.dtype not in _RESIDUES for t in tensors)):
            raise self._no_form(op, weights[0])
        return super()._exchange(op, weights, biases, recipe, params, tensors, forward, recording)

    # What is computed here

    def _is_local(self, weight: int) -> bool:
        return self._privacy.mode != "plain" and self.weights[weight].is_lookup

    def _lookup_table(self, weight: int) -> Tensor:
        found = self._lookups.get(weight)
        if found is None:
            info = self.weights[weight]
            found = self._own.read(self, info, f"privacy mode {self._privacy.mode}")
            self._lookups[weight] = found
        return found

    def _local_product(self, op: Op, x: Tensor, weight: int, recipe: Recipe) -> Tensor:
        w = look(self._lookup_table(weight), recipe).to(x.device, x.dtype)
        return F.linear(x, w) if op is Op.LINEAR else x @ w

    def _padded_lookup(self, ids: Tensor, weight: int, recipe: Recipe) -> Tensor:
        flat = ids.detach().reshape(-1)
        count = flat.numel()
        flat = F.pad(flat, (0, self._privacy.padded(count) - count))
        with self._lock:
            (found,) = self._exchange(
                Op.EMBEDDING,
                (weight,),
                (NO_BIAS,),
                recipe,
                (),
                (flat,),
                True,
                torch.is_grad_enabled(),
            )
        return found[:count].view(*ids.shape, found.shape[-1])

    # Modes

    def _make_masking(self, privacy: Privacy, helper: Opener | None) -> Masking:
        facts = ring_facts(self, privacy.bits)
        if privacy.mode == "masked-local":
            return Masking(
                facts, MaskProducts(facts, self._own, privacy.bits), privacy.bits, privacy.ahead
            )
        assert helper is not None
        assert privacy.helper is not None
        if privacy.helper == self.url:
            raise _helps_itself(self.url)
        second = Session(
            helper,
            privacy.helper,
            name=str(self._hello["client"]),
            priority=self._priority,
            retry_s=self._retry_s,
            masked=privacy.bits,
        )
        try:
            if second.welcome.get("instance", 0) == self.welcome.get("instance", 1):
                raise _helps_itself(f"{self.url}, by the other address {privacy.helper}")
            source = HelperProducts(second, facts, privacy.bits)
        except BaseException:
            second.close()
            raise
        return Masking(facts, source, privacy.bits, privacy.ahead)

    def _check_width(self, op: Op, weights: tuple[int, ...], width: int) -> None:
        """As an executor would, which is asked for other things. Raises InvalidInput."""
        for info in map(self.weights.__getitem__, weights):
            if (takes := info.shape[1 if op is Op.LINEAR else 0]) != width:
                raise InvalidInput(
                    f"{op.name.lower()} on {info.names[0]}: it takes {takes} inputs, not {width}"
                )

    def _outputs(self, op: Op, weight: int) -> int:
        return self.weights[weight].shape[0 if op is Op.LINEAR else 1]

    def _no_form(self, op: Op, weight: int, how: str = "") -> PrivacyError:
        names = self.weights[weight].names if weight in self.weights else (f"weight {weight}",)
        return PrivacyError(
            f"{op.name.lower()} on {names[0]}{how and f', {how},'} has no form in privacy mode "
            f"{self._privacy.mode}, so nothing was sent: only products with whole matrices have "
            f"one. Use another model or method, or connect without privacy"
        )


def _helps_itself(where: str) -> PrivacyError:
    return PrivacyError(
        f"the helper is the executor itself ({where}): it would know every mask. masked-split "
        f"needs a second executor, of another operator"
    )


def _is_expert(info: WeightInfo) -> bool:
    """Does a router decide how many tokens go through it? The rows of its exchanges would tell."""
    return any(_EXPERT.search(name) for name in info.names)


def _dense(session: weakref.ref[PrivateSession], weight: int) -> Tensor:
    """The numbers of a weight in float32; they are kept, for noise needs them again and again."""
    found = session()
    assert found is not None
    return found._lookup_table(weight).float()
