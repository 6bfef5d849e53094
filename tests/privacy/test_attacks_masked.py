"""The attacks of test_attacks_plain.py on masked sessions, forward and backward: all at chance.

The attacker has everything but the masks: the model, its integers, the labels of other traffic,
the true prefix of every token, and reads the residues in several ways.
"""

from __future__ import annotations

import attacks
import pytest
import torch
import torch.nn.functional as F
import traffic
from recorder import Recorder, Seen, joined
from torch import Tensor
from traffic import ADAPTED_LAYER, LENGTH, PROMPT, TRAINED_WINDOWS, VOCABULARY, Traffic
from transformers import LlamaForCausalLM

from symbiosis import Privacy
from symbiosis.privacy.ring import centred, from_wire, to_wire
from symbiosis.wire.exchange import Op
from symbiosis.wire.frames import Kind

LEAST_WORDS = 10_000_000
LEAST_P = 1e-4

MODES = ["masked-local", "masked-local, 16 bits", "masked-split"]


@pytest.fixture(scope="module", params=MODES)
def masked(request: pytest.FixtureRequest, record: traffic.Record, beside: Recorder) -> Traffic:
    """Traffic of a masked client."""
    if request.param == "masked-split":
        return record(privacy=Privacy(mode="masked-split", helper=beside.url))
    if request.param == "masked-local":
        return record(privacy="masked-local")
    return record(privacy=Privacy(mode="masked-local", bits=16, ahead=0))  # slower; so less of it


def residues(seen: list[Seen], weight: int, op: Op) -> tuple[Tensor, Tensor]:
    """All residues that were sent to ``weight`` and came back: (T, I), (T, O) int32 or int64."""
    pairs = [
        (from_wire(one.asked.tensors[0]), from_wire(one.answers[one.asked.weights.index(weight)]))
        for one in seen
        if one.asked.op is op and weight in one.asked.weights
    ]
    assert pairs, f"{op.name} was never asked of weight {weight}"
    return torch.cat([u for u, _ in pairs]), torch.cat([y for _, y in pairs])


def readings(u: Tensor) -> dict[str, Tensor]:
    """Residues (T, I) taken for numbers: as they are, by their highest byte, by their lowest."""
    bits = 32 if u.dtype is torch.int32 else 48
    top = (u >> (bits - 8)).float()
    return {"whole": (u.double() / 2.0 ** (bits - 1)).float(), "top": top, "low": (u & 255).float()}


def before_last(rows_TD: Tensor) -> Tensor:
    """Rows of every position but the last of each window: those that have a label."""
    return rows_TD.view(TRAINED_WINDOWS, LENGTH, -1)[:, :-1].flatten(0, 1)


def assert_at_chance(guesses: Tensor | list[int], truth: Tensor) -> None:
    found = torch.as_tensor(guesses)
    assert attacks.at_chance(found, truth, VOCABULARY), f"{attacks.share(found, truth):.2%} right"


# What is sent at all


def test_nothing_but_residues_is_sent(masked: Traffic) -> None:
    """No float, no token id; the tied embedding and output head are not asked for at all."""
    seen = masked.prompt + masked.again + masked.forward + masked.backward
    assert {one.asked.op for one in seen} == {Op.RING_LINEAR, Op.RING_MATMUL}
    tensors = [t for one in seen for t in (*one.asked.tensors, *one.answers)]
    assert {t.dtype for t in tensors} <= {torch.int32, torch.int16}
    assert masked.weight("embed_tokens") not in {w for one in seen for w in one.asked.weights}
    kinds = {kind for kind, _ in masked.recorder.frames}
    assert kinds == {Kind.HELLO, Kind.REQUEST, Kind.EXCHANGE}


# Tokens


@pytest.mark.parametrize("reading", ["whole", "top", "low"])
def test_nearest_embedding(masked: Traffic, first_inputs: Tensor, reading: str) -> None:
    u, _ = residues(masked.forward, masked.weight("0.self_attn.q_proj"), Op.RING_LINEAR)
    found = attacks.most_aligned(readings(u)[reading], first_inputs)
    assert_at_chance(found, masked.ids.flatten())


@pytest.mark.parametrize("reading", ["whole", "top", "low"])
def test_candidates_behind_a_given_prefix(
    masked: Traffic, matcher: attacks.Matcher, reading: str
) -> None:
    u, _ = residues(masked.prompt, masked.weight("2.self_attn.q_proj"), Op.RING_LINEAR)
    ids = masked.ids[0, :PROMPT]
    found = attacks.match_given_prefix(readings(u)[reading], ids.tolist(), matcher)
    assert_at_chance(found, ids)


@pytest.mark.parametrize("name", ["0.self_attn.q_proj", "1.mlp.gate_proj"])
def test_a_probe_learns_nothing_forward(masked: Traffic, embeddings: Tensor, name: str) -> None:
    u, y = residues(masked.forward, masked.weight(name), Op.RING_LINEAR)
    both = torch.cat([*readings(u).values(), readings(y)["whole"]], 1)
    assert_no_better_than_constant(both, masked.ids.flatten(), embeddings)


@pytest.mark.parametrize("name", ["5.mlp.down_proj", "1.self_attn.q_proj"])
def test_a_probe_learns_nothing_backward(masked: Traffic, embeddings: Tensor, name: str) -> None:
    u, y = residues(masked.backward, masked.weight(name), Op.RING_MATMUL)
    both = before_last(torch.cat([readings(u)["whole"], readings(y)["whole"]], 1))
    assert_no_better_than_constant(both, masked.labels.flatten(), embeddings)


def assert_no_better_than_constant(x: Tensor, truth: Tensor, embeddings: Tensor) -> None:
    """A probe that has seen three quarters of the traffic with its labels."""
    learned = len(x) * 3 // 4
    guesses = attacks.probe(x[:learned], truth[:learned], x[learned:], embeddings)
    rate = attacks.constant_guess(truth[:learned], truth[learned:])
    hits = int((guesses == truth[learned:]).sum())
    assert hits <= attacks.excused(rate, len(truth) - learned)


# The adapter


def test_least_squares_recover_no_adapter(
    masked: Traffic, plain: Traffic, whole: LlamaForCausalLM
) -> None:
    """Not even if the attacker is told the length of every row, which stays with the client."""
    sent = []
    for name in ("up_proj", "down_proj"):
        name = f"{ADAPTED_LAYER}.mlp.{name}"
        u, _ = residues(masked.forward, masked.weight(name), Op.RING_LINEAR)
        x, _ = joined(plain.forward, plain.weight(name), op=Op.LINEAR)
        sent.append(F.normalize(readings(u)["whole"], dim=1) * x.norm(dim=1, keepdim=True))
    mlp = whole.model.layers[ADAPTED_LAYER].mlp
    gate, up = (F.linear(sent[0], p.weight.detach()) for p in (mlp.gate_proj, mlp.up_proj))
    found = attacks.adapter_beside(sent[0], sent[1], gate, up, traffic.RANK)
    assert attacks.relative_error(found, masked.delta) > 0.9
    assert abs(attacks.resemblance(found, masked.delta)) < 0.1


# Labels


@pytest.mark.parametrize("reading", ["whole", "top", "low"])
def test_no_labels_from_the_gradient(
    masked: Traffic, whole: LlamaForCausalLM, embeddings: Tensor, reading: str
) -> None:
    u, _ = residues(masked.backward, masked.weight("5.mlp.down_proj"), Op.RING_MATMUL)
    norm = whole.model.norm.weight.detach()
    found = attacks.labels_from_residual(before_last(readings(u)[reading]), norm, embeddings)
    assert_at_chance(found, masked.labels.flatten())


# Uniformity


def byte_counts(payloads: list[Tensor]) -> tuple[Tensor, int]:
    """How often each byte occurs in the payloads as sent, and how many residues there are."""
    counts = torch.zeros(256, dtype=torch.int64)
    for payload in payloads:
        counts += torch.bincount(payload.contiguous().view(torch.uint8).flatten(), minlength=256)
    return counts, sum(p.numel() // (1 if p.dtype is torch.int32 else 3) for p in payloads)


@pytest.mark.parametrize("op", [Op.RING_LINEAR, Op.RING_MATMUL])
def test_payloads_are_uniform(masked: Traffic, op: Op) -> None:
    seen = masked.forward if op is Op.RING_LINEAR else masked.backward
    sent = [one.asked.tensors[0] for one in seen if one.asked.op is op]
    counts, words = byte_counts(sent)
    assert words >= LEAST_WORDS
    assert attacks.uniformity(counts) > LEAST_P


def test_neighbouring_rows_share_no_mask(masked: Traffic) -> None:
    """Differences of rows are differences of activations where a mask came twice."""
    sent = [from_wire(one.asked.tensors[0]) for one in masked.forward if one.asked.weights]
    steps = [(u[1:] - u[:-1]) for u in sent]
    counts, _ = byte_counts([_wire(step) for step in steps])
    assert attacks.uniformity(counts) > LEAST_P


def test_the_same_prompt_again_takes_other_masks(masked: Traffic) -> None:
    first, second = (
        [from_wire(one.asked.tensors[0]) for one in seen] for seen in (masked.prompt, masked.again)
    )
    assert [u.shape for u in first] == [u.shape for u in second], "sizes and order do show"
    counts, _ = byte_counts([_wire(b - a) for a, b in zip(first, second, strict=True)])
    assert attacks.uniformity(counts) > LEAST_P


def _wire(u: Tensor) -> Tensor:
    """Residues as they would travel."""
    return to_wire(u if u.dtype is torch.int32 else centred(u.clone()))


# The second executor


def test_the_helper_is_told_keys_and_sizes(record: traffic.Record, beside: Recorder) -> None:
    """The keys are random and the sizes are those of the exchanges: nothing depends on data, and
    no mask is multiplied twice."""
    before = len(beside.seen)
    split = record(privacy=Privacy(mode="masked-split", helper=beside.url, ahead=0), windows=1)
    split.session.close()
    asked = [one.asked for one in beside.seen[before:]]
    assert {one.op for one in asked} == {Op.RING_MASK}
    assert {(t.dtype, t.shape) for one in asked for t in one.tensors} == {(torch.uint8, (32,))}
    names = [(_bytes(one.tensors[0]), one.params[3]) for one in asked]
    assert len(set(names)) == len(names)
    seen = split.prompt + split.again + split.forward + split.backward
    sizes = [(one.asked.op, one.asked.weights, len(one.asked.tensors[0])) for one in seen]
    told = [(one.params[0], one.weights, one.params[2]) for one in asked]
    assert told[-len(sizes) :] == sizes, "one mask for each exchange, of its size"
    keys = {key for key, _ in names}
    assert not any(key in _bytes(one.asked.tensors[0]) for key in keys for one in split.prompt)


def _bytes(payload: Tensor) -> bytes:
    return payload.contiguous().view(torch.uint8).numpy().tobytes()
