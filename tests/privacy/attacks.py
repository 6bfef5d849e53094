"""Attacks on what an executor sees, by whoever operates it.

Each works on recorded tensors and the model, which the operator has. Letters: T tokens, d width
of the model, I and O width of a product's input and output, V vocabulary. All tensors are float
unless said otherwise; who attacks integers gives them as floats, in whichever reading.
Sources of the ideas: inversion of embeddings by nearest neighbours; candidate matching of hidden
states; label recovery from gradients (Zhao et al., arXiv 2001.02610); the rest is linear algebra.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

LAST_RESORT = 1e-30


def nearest(observed_TD: Tensor, table_VD: Tensor) -> Tensor:
    """The row of the table that is nearest to each observation: (T,)."""
    halves = 0.5 * table_VD.square().sum(1)
    return (observed_TD @ table_VD.T - halves).argmax(1)


def most_aligned(observed_TD: Tensor, table_VD: Tensor) -> Tensor:
    """As `nearest`, whatever the observation's scale: by the cosine."""
    return (observed_TD @ F.normalize(table_VD, dim=1).T).argmax(1)


# Tokens by candidates


class Matcher:
    """Runs the model's first layers on every token of the vocabulary, behind a known prefix."""

    def __init__(self, model: LlamaForCausalLM, layers: int) -> None:
        """``layers``: candidates are compared at the input of that layer's q, k and v."""
        self._model, self._layers = model.model, model.model.layers[: layers + 1]
        self._found: dict[tuple[int, ...], Tensor] = {}

    @torch.no_grad()
    def candidates(self, prefix: list[int]) -> Tensor:
        """(V, d): the normalised input of the layer if each token followed the prefix."""
        key = tuple(prefix)
        if key not in self._found:
            self._found[key] = self._run(prefix)
        return self._found[key]

    def _run(self, prefix: list[int]) -> Tensor:
        table = self._model.embed_tokens.weight
        at = torch.tensor([len(prefix)])
        before, now = table[prefix], table
        for layer in self._layers[:-1]:
            before, now = _layer(layer, self._model.rotary_emb, before, now, at)
        return self._layers[-1].input_layernorm(now)


def _layer(
    layer: torch.nn.Module, rotary: torch.nn.Module, before_PD: Tensor, now_VD: Tensor, at: Tensor
) -> tuple[Tensor, Tensor]:
    """One layer on a prefix, and on candidates that each follow the prefix alone."""
    attention, prefix = layer.self_attn, len(before_PD)
    both = torch.cat([before_PD, now_VD])
    normed = layer.input_layernorm(both)
    positions = torch.cat([torch.arange(prefix), at.expand(len(now_VD))])[None]
    heads = [
        product(normed).view(1, len(both), -1, attention.head_dim).transpose(1, 2)
        for product in (attention.q_proj, attention.k_proj, attention.v_proj)
    ]
    q, k = apply_rotary_pos_emb(heads[0], heads[1], *rotary(both, positions))
    k, v = (t[0].repeat_interleave(attention.num_key_value_groups, 0) for t in (k, heads[2]))
    q = q[0]
    scores = q @ k[:, :prefix].transpose(1, 2)  # (heads, prefix + V, prefix)
    scores[:, :prefix] += torch.full((prefix, prefix), -math.inf).triu(1)
    own = (q * k).sum(-1, keepdim=True)
    own[:, :prefix] = -math.inf  # a token of the prefix is among the keys already
    chances = (torch.cat([scores, own], -1) * attention.scaling).softmax(-1)
    mixed = chances[..., :prefix] @ v[:, :prefix] + chances[..., prefix:] * v
    both = both + attention.o_proj(mixed.transpose(0, 1).reshape(len(both), -1))
    both = both + layer.mlp(layer.post_attention_layernorm(both))
    return both[:prefix], both[prefix:]


def match_tokens(observed_TD: Tensor, matcher: Matcher) -> list[int]:
    """One sequence, token by token: each is sought behind those found before."""
    found: list[int] = []
    for row in observed_TD:
        found.append(int(nearest(row[None], matcher.candidates(found))))
    return found


def match_given_prefix(observed_TD: Tensor, ids: list[int], matcher: Matcher) -> list[int]:
    """As `match_tokens`, for an attacker who is told the true prefix of every token."""
    return [
        int(most_aligned(row[None], matcher.candidates(ids[:at])))
        for at, row in enumerate(observed_TD)
    ]


# Tokens by a probe


def probe(
    train_TD: Tensor, labels_T: Tensor, test_TD: Tensor, targets_VD: Tensor, ridge: float = 1e-3
) -> Tensor:
    """Ridge regression from labelled traffic to the embedding, then the nearest: (T',)."""
    mean, spread = train_TD.mean(0), train_TD.std(0).clamp_min(LAST_RESORT)
    x, wanted = (train_TD - mean) / spread, targets_VD[labels_T]
    middle = wanted.mean(0)
    gram = x.T @ x + ridge * len(x) * torch.eye(x.shape[1])
    weights = torch.linalg.solve(gram, x.T @ (wanted - middle))
    return nearest((test_TD - mean) / spread @ weights + middle, targets_VD)


# The adapter


def adapter_beside(
    x_TI: Tensor, gated_TO: Tensor, gate_TO: Tensor, base_TO: Tensor, rank: int
) -> Tensor:
    """The product BA (O, I) of a LoRA on ``up`` in ``act(gate) · up``, in float64.

    ``x`` is the input of gate and up, ``gate`` the gate's and ``base`` up's own answer without
    adapter, ``gated`` the input of the product that follows. Least squares on a few output
    features find the row space of A; within it, all others have ``rank`` unknowns each.
    """
    x, base = x_TI.double(), base_TO.double()
    factor = F.silu(gate_TO.double())
    rest = gated_TO.double() - factor * base  # = factor · (BA x)
    few = torch.linspace(0, rest.shape[1] - 1, 3 * rank).long()
    systems = factor.T[few, :, None] * x  # (few, T, I)
    found = torch.linalg.lstsq(systems, rest.T[few, :, None]).solution[..., 0]
    directions = torch.linalg.svd(found, full_matrices=False).Vh[:rank]
    z = x @ directions.T
    systems = factor.T[:, :, None] * z  # (O, T, rank)
    return torch.linalg.lstsq(systems, rest.T[:, :, None]).solution[..., 0] @ directions


def relative_error(found: Tensor, truth: Tensor) -> float:
    """By the Frobenius norm."""
    return float((found.double() - truth.double()).norm() / truth.double().norm())


def resemblance(found: Tensor, truth: Tensor) -> float:
    """The cosine between two matrices, whatever their scales."""
    return float(F.cosine_similarity(found.double().flatten(), truth.double().flatten(), dim=0))


# Labels


def labels_from_logits(dlogits_TV: Tensor) -> Tensor:
    """The gradient of cross entropy is negative at the label alone."""
    return dlogits_TV.argmin(1)


def labels_from_residual(dy_TD: Tensor, norm_D: Tensor, head_VD: Tensor) -> Tensor:
    """From the gradient behind the last down-projection: it points away from the label's row of
    the output head, seen through the final norm."""
    return most_aligned(-dy_TD, norm_D * head_VD)


# Masks that are no masks


def unmask_fixed(observed_TD: Tensor, table_VD: Tensor) -> Tensor:
    """Tokens (T,) under one noise vector for all: u = e + n.

    Each token tried for the first row gives a noise vector; the right one makes rows of the table
    out of the next rows too.
    """
    misses = torch.zeros(len(table_VD))
    for row in observed_TD[1:4]:
        shifted = table_VD + (row - observed_TD[0])
        guesses = nearest(shifted, table_VD)
        misses += (shifted - table_VD[guesses]).square().sum(1)
    noise = observed_TD[0] - table_VD[misses.argmin()]
    return nearest(observed_TD - noise, table_VD)


def unmask_pooled(observed_TD: Tensor, pool: int, table_VD: Tensor) -> Tensor:
    """Tokens (T,) under noise from the span of ``pool`` vectors, far larger than what it hides:
    the traffic's own main directions are that span, and beside it nothing is hidden."""
    observed, table = observed_TD.double(), table_VD.double()
    spanned = torch.linalg.eigh(observed.T @ observed).eigenvectors.T.flip(0)
    beside = spanned[pool:]  # (d - pool, d)
    return nearest(observed @ beside.T, table @ beside.T)


# Statistics


def uniformity(counts: Tensor) -> float:
    """The p-value of χ² for counts that should be equal."""
    expected = counts.double().mean()
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


def chance(guesses_T: Tensor, truth_T: Tensor, vocabulary: int) -> float:
    """How often guesses with these frequencies meet these truths if they know nothing of them."""
    shares = [
        torch.bincount(ids, minlength=vocabulary).double() / len(ids)
        for ids in (guesses_T, truth_T)
    ]
    return float(shares[0] @ shares[1])


def at_chance(guesses_T: Tensor, truth_T: Tensor, vocabulary: int) -> bool:
    """Whether no more was guessed right than `excused` says."""
    hits = int((guesses_T == truth_T).sum())
    return hits <= excused(chance(guesses_T, truth_T, vocabulary), len(truth_T))


def excused(rate: float, count: int) -> float:
    """Hits out of ``count`` that say nothing, if each comes by chance at ``rate``.

    Masks are drawn anew in every run, and there are some fifty checks: three standard deviations
    for all of them together are four and a half for each, and three hits where hits are rare.
    """
    return count * rate + 4.5 * math.sqrt(count * rate) + 3


def constant_guess(known_T: Tensor, truth_T: Tensor) -> float:
    """How often the most frequent token of what is known is right elsewhere."""
    return share(known_T.mode().values.expand_as(truth_T), truth_T)


def share(guesses: Tensor | list[int], truth: Tensor | list[int]) -> float:
    """The share of right guesses."""
    return float((torch.as_tensor(guesses) == torch.as_tensor(truth)).float().mean())
