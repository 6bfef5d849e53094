"""Every PEFT method on a Llama, some on a GPT-2 and a Mixtral: exact, and no fetch in a step.

The whole of the table, with what peft itself cannot do, is ``python -m tests.conformance.methods``.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

from conformance.methods_lora import LORA_FIELDS_LEFT, LORA_ROWS, uncovered_fields
from conformance.methods_models import SUBJECTS
from conformance.methods_others import OTHER_ROWS
from conformance.methods_rows import Row
from conformance.methods_table import render
from conformance.methods_trial import STEPS, Bench, Outcome, bench, try_method, try_without_fetch

ROWS = {row.name: row for row in (*LORA_ROWS, *OTHER_ROWS)}

ON_GPT2 = [
    "LoRA",
    "LoRA, head and embedding",
    "LoRA, DoRA",
    "LoRA, PiSSA",
    "LoRA, `target_parameters`",
    "IA3",
    "VeRA",
    "HiRA",
    "FRoD",
    "Prefix tuning",
]
"""Conv1D, whose weight is read transposed; tied embeddings."""

ON_MIXTRAL = [
    "LoRA, all linear",
    "LoRA, PiSSA by iterations",
    "LoRA, `target_parameters`",
    "LoRA, `layer_replication`",
    "AdaLoRA",
    "OFT",
    "SHiRA",
    "Poly",
    "X-LoRA",
    "Prompt tuning",
]
"""Experts as three-dimensional weights."""

NEVER_FETCH = ["LoRA", "LoRA, EVA", "AdaLoRA", "IA3", "VeRA", "OFT", "BOFT", "HRA", "Prefix tuning"]


@pytest.fixture(scope="module")
def llama() -> Iterator[Bench]:
    with bench(SUBJECTS["llama"]) as opened:
        yield opened


@pytest.fixture(scope="module")
def gpt2() -> Iterator[Bench]:
    with bench(SUBJECTS["gpt2"]) as opened:
        yield opened


@pytest.fixture(scope="module")
def mixtral() -> Iterator[Bench]:
    with bench(SUBJECTS["mixtral"]) as opened:
        yield opened


LAST_BIT = {"PEANuT"}
"""Multiplies a fetched weight in every step: on some processors the last bit depends on where the
copy lies in memory (an AVX-512 Xeon: gradients differ by 1.4e-7; an EPYC: the same bits)."""


def assert_exact(row: Row, on: Bench) -> Outcome:
    outcome = try_method(row, on)
    if outcome.verdict == "not tried":
        pytest.skip(outcome.detail)
    told = f"{outcome.verdict} {outcome.detail} {outcome.differences}"
    if row.name in LAST_BIT:
        assert outcome.verdict in ("exact", "differs"), told
        assert max(outcome.differences.values(), default=0.0) < 1e-6, told
    else:
        assert outcome.verdict == "exact", told
    assert outcome.fetches_later == 0
    return outcome


@pytest.mark.parametrize("name", ROWS)
def test_a_method_on_a_llama(llama: Bench, name: str) -> None:
    outcome = assert_exact(ROWS[name], llama)
    if name in NEVER_FETCH:
        assert outcome.kept_share == 0


@pytest.mark.parametrize("name", ON_GPT2)
def test_a_method_on_a_gpt2(gpt2: Bench, name: str) -> None:
    assert_exact(ROWS[name], gpt2)


@pytest.mark.parametrize("name", ON_MIXTRAL)
def test_a_method_on_a_mixtral(mixtral: Bench, name: str) -> None:
    assert_exact(ROWS[name], mixtral)


@pytest.mark.parametrize("name", ["LoRA, DoRA", "LoRA, PiSSA", "HiRA", "SHiRA"])
def test_a_method_that_needs_whole_weights_says_so(llama: Bench, name: str) -> None:
    refusal = try_without_fetch(ROWS[name], llama)
    kind = ROWS[name].peft_type.lower()
    assert refusal.startswith("FetchRefused: ")
    assert f"(peft.tuners.{kind}." in refusal
    assert "proj.weight, and this executor does not hand out weights" in refusal


@pytest.mark.parametrize("name", ["LoRA", "IA3", "OFT"])
def test_a_method_that_does_not_need_them_works_without(llama: Bench, name: str) -> None:
    assert try_without_fetch(ROWS[name], llama) == ""


def test_every_type_of_the_installed_peft_has_a_row() -> None:
    registered = {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert {kind.value for kind in PEFT_TYPE_TO_TUNER_MAPPING} == registered
    assert {kind.value for kind in PeftType} >= registered
    assert registered - {row.peft_type for row in ROWS.values()} == set()


def test_every_option_of_lora_has_a_row() -> None:
    assert uncovered_fields() == set()
    assert not {name for row in LORA_ROWS for name in row.covers} & set(LORA_FIELDS_LEFT)


def test_a_method_that_peft_cannot_do_is_told_in_its_words(gpt2: Bench) -> None:
    outcome = try_method(ROWS["SHiRA"], gpt2)
    assert outcome.verdict == "plain peft cannot"
    assert "Conv1D" in outcome.detail


def test_the_table() -> None:
    rows = [ROWS["LoRA"], ROWS["LoRA, DoRA"], ROWS["SHiRA"]]
    outcomes = {
        ("LoRA", "Llama"): Outcome("LoRA", "Llama", "exact"),
        ("LoRA, DoRA", "Llama"): Outcome(
            "LoRA, DoRA", "Llama", "differs", differences={"outputs": 2e-6}, fetches_start=6
        ),
        ("SHiRA", "Llama"): Outcome("SHiRA", "Llama", "plain peft cannot", "TypeError: no | way"),
    }
    refusals = {("LoRA", "Llama"): "", ("LoRA, DoRA", "Llama"): "FetchRefused: no"}
    page, summary = render(rows, outcomes, refusals, STEPS)
    assert "| LoRA | LORA | exact | 0 | 0 | works |  |" in page
    assert "| LoRA, DoRA | LORA | differs by 2e-06 | 6 + 0 + 0 + 0 | 0 | refused (1) |  |" in page
    assert "| SHiRA | SHIRA | plain peft cannot (2) |" in page
    assert "1. FetchRefused: no\n2. TypeError: no \\| way" in page
    assert summary.startswith("3 combinations: 1 exact, 1 differs, 1 plain peft cannot.")
