from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import peft
import pytest

from symbiosis.errors import MethodError
from symbiosis.jobs.methods import (
    ALIASES,
    friendly,
    known_methods,
    option_names,
    read_options,
    resolve,
)


def test_every_method_of_peft_is_known() -> None:
    known = known_methods()
    assert len(known) == len(peft.PEFT_TYPE_TO_CONFIG_MAPPING) > 20
    for kind in peft.PEFT_TYPE_TO_CONFIG_MAPPING:
        assert friendly(kind.value) in known
        assert option_names(kind.value)


@pytest.mark.parametrize(
    ("name", "peft_type"),
    [
        ("lora", "LORA"),
        ("LoRA", "LORA"),
        ("IA3", "IA3"),
        ("prefix", "PREFIX_TUNING"),
        ("prefix-tuning", "PREFIX_TUNING"),
        ("Prefix Tuning", "PREFIX_TUNING"),
        ("p-tuning", "P_TUNING"),
        ("ptuning", "P_TUNING"),
        ("P_TUNING", "P_TUNING"),
        ("prompt", "PROMPT_TUNING"),
        ("prompt-tuning", "PROMPT_TUNING"),
        ("ln-tuning", "LN_TUNING"),
        ("vera", "VERA"),
    ],
)
def test_spellings(name: str, peft_type: str) -> None:
    assert resolve(name).peft_type == peft_type


def test_aliases_lead_to_methods_of_the_installed_peft() -> None:
    for name in ALIASES:
        resolve(name)
    assert resolve("dora").options["use_dora"] is True


def test_defaults_give_way_to_options() -> None:
    assert resolve("lora").options["target_modules"] == "all-linear"
    assert resolve("lora").options["task_type"] == "CAUSAL_LM"
    assert resolve("lora", {"target_modules": ["q_proj"]}).options["target_modules"] == ["q_proj"]
    for name in ("prefix", "p-tuning", "prompt"):
        assert resolve(name).options["num_virtual_tokens"] == 20
        assert resolve(name, {"num_virtual_tokens": 3}).options["num_virtual_tokens"] == 3


def test_an_unknown_method_brings_the_list() -> None:
    with pytest.raises(
        MethodError, match=r"no PEFT method 'lorra'\. Did you mean lora\? Known: "
    ) as e:
        resolve("lorra")
    assert "prefix-tuning" in str(e.value)
    with pytest.raises(MethodError, match=r"no PEFT method 'xyzzyx'\. Known: "):
        resolve("xyzzyx")


def test_an_unknown_option_brings_near_ones_and_the_list() -> None:
    with pytest.raises(
        MethodError, match=r"lora has no option 'rank'\. Did you mean .*Its options: .*lora_alpha"
    ):
        resolve("lora", {"rank": 3})
    with pytest.raises(MethodError, match=r"has no option 'lora_alfa'\. Did you mean lora_alpha"):
        resolve("lora", {"lora_alfa": 3})
    with pytest.raises(MethodError, match="has no option 'peft_type'"):
        resolve("lora", {"peft_type": "IA3"})


def test_options_that_peft_refuses() -> None:
    with pytest.raises(MethodError, match=r"lora refuses its options: .*layers_to_transform"):
        resolve("lora", {"layers_pattern": "h", "target_modules": ["q_proj"]})


def test_methods_that_texts_cannot_train() -> None:
    for name in ("poly", "multitask-prompt-tuning", "xlora"):
        with pytest.raises(MethodError, match=rf"{name} cannot be used: it .*session\.model\(\)"):
            resolve(name)


def test_adalora_learns_the_length_of_the_run() -> None:
    assert resolve("adalora").config(steps=777).total_step == 777
    assert resolve("adalora", {"total_step": 5000}).config(steps=777).total_step == 5000


def test_every_configuration_can_be_built_or_says_why() -> None:
    """With no options at all: what peft demands is told as a MethodError."""
    for name in known_methods():
        try:
            config = resolve(name).config(steps=1000)
        except MethodError as error:
            assert name in str(error)
        else:
            assert dataclasses.asdict(config)["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("r=16", 16),
        ("r= 16", 16),
        ("r=0.5", 0.5),
        ("r=1e-3", 1e-3),
        ("r=-2E5", -2e5),
        ("r=true", True),
        ("r=null", None),
        ("r=none", "none"),
        ("r=all-linear", "all-linear"),
        ("r=[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("r={a: 1}", {"a": 1}),
        ("r=a=b", "a=b"),
    ],
)
def test_values(text: str, value: object) -> None:
    assert read_options([text]) == {"r": value}


def test_module_lists() -> None:
    options = read_options(
        ["target_modules=q_proj", "modules_to_save=lm_head, norm", "exclude_modules=.*k_proj"]
    )
    assert options == {
        "target_modules": ["q_proj"],
        "modules_to_save": ["lm_head", "norm"],
        "exclude_modules": ".*k_proj",
    }
    assert read_options(["target_modules=all-linear"]) == {"target_modules": "all-linear"}


@pytest.mark.parametrize("text", ["r", "=3", " =3"])
def test_malformed_assignments(text: str) -> None:
    with pytest.raises(MethodError, match="write key=value"):
        read_options([text])


def test_a_value_that_is_not_yaml() -> None:
    with pytest.raises(MethodError, match="not YAML"):
        read_options(["r=[1"])


def test_files(tmp_path: Path) -> None:
    yaml, js = tmp_path / "c.yaml", tmp_path / "c.json"
    yaml.write_text("r: 4\nlora_dropout: 1e-1\n")
    js.write_text(json.dumps({"r": 4, "target_modules": "q_proj"}))
    assert read_options(["r=8"], yaml) == {"r": 8, "lora_dropout": 0.1}
    assert read_options([], js) == {"r": 4, "target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    ("name", "content"),
    [("c.yaml", "r: [1"), ("c.json", "{"), ("c.yaml", "- r"), ("c.json", "3"), ("c.yaml", "1: 2")],
)
def test_malformed_files(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(MethodError, match=name):
        read_options([], tmp_path / name)
    with pytest.raises(MethodError, match="cannot read"):
        read_options([], tmp_path / "missing.yaml")
