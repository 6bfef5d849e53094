"""Positive controls: in the mode `plain` every attack succeeds.

If one of these fails, the attack is broken and its failure on the private modes proves nothing.
They also show what "adapters stay with the client" alone is worth against the operator: nothing.
"""

from __future__ import annotations

import attacks
import pytest
import torch
import traffic
from recorder import joined
from torch import Tensor
from traffic import ADAPTED_LAYER, LENGTH, PROMPT, TRAINED_WINDOWS, VOCABULARY, Traffic
from transformers import LlamaForCausalLM

from symbiosis.wire.exchange import Op


def before_last(rows_TD: Tensor) -> Tensor:
    """Rows of every position but the last of each window: those that have a label."""
    return rows_TD.view(TRAINED_WINDOWS, LENGTH, -1)[:, :-1].flatten(0, 1)


def test_the_ids_themselves_are_sent(plain: Traffic) -> None:
    asked = [one.asked for one in plain.forward if one.asked.op is Op.EMBEDDING]
    assert any(torch.equal(one.tensors[0], plain.ids) for one in asked)


def test_nearest_embedding_at_the_first_layer(plain: Traffic, first_inputs: Tensor) -> None:
    x, _ = joined(plain.forward, plain.weight("0.self_attn.q_proj"), op=Op.LINEAR)
    assert attacks.share(attacks.nearest(x, first_inputs), plain.ids.flatten()) >= 0.99


def test_candidates_behind_the_recovered_prefix(plain: Traffic, matcher: attacks.Matcher) -> None:
    """At a later layer, from its activations alone."""
    x, _ = joined(plain.prompt, plain.weight("2.self_attn.q_proj"), op=Op.LINEAR)
    found = attacks.match_tokens(x, matcher)
    assert len(found) == PROMPT
    assert attacks.share(found, plain.ids[0, :PROMPT]) >= 0.99


def test_candidates_behind_a_given_prefix(plain: Traffic, matcher: attacks.Matcher) -> None:
    """The attack that the private modes have to stand, by the direction alone."""
    x, _ = joined(plain.prompt, plain.weight("2.self_attn.q_proj"), op=Op.LINEAR)
    found = attacks.match_given_prefix(x, plain.ids[0, :PROMPT].tolist(), matcher)
    assert attacks.share(found, plain.ids[0, :PROMPT]) >= 0.99


@pytest.mark.parametrize("name", ["1.self_attn.q_proj", "1.self_attn.o_proj", "1.mlp.gate_proj"])
def test_a_probe_learns_from_labelled_traffic(
    plain: Traffic, embeddings: Tensor, name: str
) -> None:
    """Far beyond the constant guess, though the adapter is unknown."""
    x, _ = joined(plain.forward, plain.weight(name), op=Op.LINEAR)
    ids, learned = plain.ids.flatten(), len(x) * 3 // 4
    guesses = attacks.probe(x[:learned], ids[:learned], x[learned:], embeddings)
    truth = ids[learned:]
    assert attacks.share(guesses, truth) >= 2 * attacks.constant_guess(ids[:learned], truth)
    assert not attacks.at_chance(guesses, truth, VOCABULARY)


def test_least_squares_recover_the_adapter(plain: Traffic) -> None:
    """From the inputs and outputs around the adapted module."""
    place = f"{ADAPTED_LAYER}.mlp"
    x, gate = joined(plain.forward, plain.weight(f"{place}.gate_proj"), op=Op.LINEAR)
    _, up = joined(plain.forward, plain.weight(f"{place}.up_proj"), op=Op.LINEAR)
    gated, _ = joined(plain.forward, plain.weight(f"{place}.down_proj"), op=Op.LINEAR)
    found = attacks.adapter_beside(x, gated, gate, up, rank=traffic.RANK)
    assert attacks.relative_error(found, plain.delta) < 1e-3


def test_labels_from_the_gradient_of_the_logits(plain: Traffic) -> None:
    dlogits, _ = joined(plain.backward, plain.weight("embed_tokens"), op=Op.MATMUL)
    guesses = attacks.labels_from_logits(before_last(dlogits))
    assert attacks.share(guesses, plain.labels.flatten()) >= 0.99


def test_labels_from_the_gradient_at_the_last_down_projection(
    plain: Traffic, whole: LlamaForCausalLM, embeddings: Tensor
) -> None:
    dy, _ = joined(plain.backward, plain.weight("5.mlp.down_proj"), op=Op.MATMUL)
    norm = whole.model.norm.weight.detach()
    guesses = attacks.labels_from_residual(before_last(dy), norm, embeddings)
    assert attacks.share(guesses, plain.labels.flatten()) >= 0.70
