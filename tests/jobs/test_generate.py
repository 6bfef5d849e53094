from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import symbiosis
from symbiosis.errors import ConnectionFailed, ModelError
from symbiosis.jobs import finetune, generate
from symbiosis.jobs.generate import Piece
from symbiosis.jobs.spec import FinetuneSpec, GenerateSpec

METHODS = ("lora", "ia3", "prefix", "p-tuning", "prompt")


@pytest.fixture(scope="module")
def adapters(
    base: str, train_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """One adapter of each method, trained for a few steps."""
    folder = tmp_path_factory.mktemp("adapters")
    for method in METHODS:
        finetune.run(
            FinetuneSpec(
                base=base,
                data=train_file,
                out=folder / method,
                method=method,
                steps=4,
                learning_rate=5e-2,
                save_steps=0,
            )
        )
    return {method: folder / method for method in METHODS}


def locally(model_folder: Path, prompt: str, max_new_tokens: int) -> str:
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    found = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    return str(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))


def test_the_base_by_itself_says_what_the_local_model_says(base: str, model_folder: Path) -> None:
    (answer,) = generate.run(GenerateSpec(base=base, prompts=("the cat",), max_new_tokens=9))
    assert answer.adapter == "base"
    assert answer.prompt == "the cat"
    assert answer.text == locally(model_folder, "the cat", 9)
    assert 0 < answer.tokens <= 9
    assert answer.tokens_per_s > 0


def test_every_prompt_with_adapters_of_every_method(base: str, adapters: dict[str, Path]) -> None:
    """Side by side they say what each says by itself, and pieces make up the answers."""
    pieces: list[Piece] = []
    prompts = ("the cat", "a dog")
    spec = GenerateSpec(
        base=base, prompts=prompts, adapters=tuple(adapters.values()), max_new_tokens=7
    )
    answers = generate.run(spec, pieces.append)
    assert [(a.prompt, a.adapter) for a in answers] == [(p, m) for p in prompts for m in METHODS]
    for answer in answers:
        index = prompts.index(answer.prompt)
        own = [p for p in pieces if (p.adapter, p.prompt) == (answer.adapter, index)]
        assert "".join(piece.text for piece in own) == answer.text
        assert [piece.end for piece in own].index(True) == len(own) - 1
        (alone,) = generate.run(
            GenerateSpec(
                base=base,
                prompts=(answer.prompt,),
                adapters=(adapters[answer.adapter],),
                max_new_tokens=7,
            )
        )
        assert alone.text == answer.text
    assert len({answer.text for answer in answers}) > 2, "the adapters make no difference"


def test_sampling(base: str) -> None:
    def texts(**fields: object) -> list[str]:
        spec = GenerateSpec.from_mapping(
            {"base": base, "prompts": ("the cat", "a dog"), "max_new_tokens": 12, **fields}
        )
        return [answer.text for answer in generate.run(spec)]

    warm = {"sampling": True, "temperature": 2.0}
    assert texts(**warm, seed=1) == texts(**warm, seed=1)
    assert texts(**warm, seed=1) != texts(**warm, seed=2)
    assert texts(**warm, seed=1)[1] == texts(**warm, seed=1, prompts=("a dog",))[0]
    assert texts(**warm, top_k=1) == texts()
    assert texts(**warm, top_p=1e-6) == texts()


def test_chat(base: str, model_folder: Path) -> None:
    spec = GenerateSpec(base=base, prompts=("hi",), chat=True, max_new_tokens=5)
    (answer,) = generate.run(spec)
    assert answer.text == locally(model_folder, "<user>hi</s><assistant>", 5)


def test_a_prompt_without_tokens(base: str) -> None:
    with pytest.raises(ModelError, match="has no tokens"):
        generate.run(GenerateSpec(base=base, prompts=("",)))


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_for_another_width(
    wider_base: str, adapters: dict[str, Path], method: str, model_folder: Path
) -> None:
    with pytest.raises(ModelError, match=r"does not fit .*wider-llama") as caught:
        generate.run(GenerateSpec(base=wider_base, prompts=("a",), adapters=(adapters[method],)))
    assert f"it was made for {model_folder}" in str(caught.value)


@pytest.mark.parametrize("method", ("lora", "ia3", "prefix"))
def test_an_adapter_for_more_layers(
    shallow_base: str, adapters: dict[str, Path], method: str
) -> None:
    """Where shapes agree peft is content to leave tensors over."""
    with pytest.raises(ModelError, match=r"does not fit .*shallow-llama"):
        generate.run(GenerateSpec(base=shallow_base, prompts=("a",), adapters=(adapters[method],)))


def test_damaged_and_missing_adapters(base: str, adapters: dict[str, Path], tmp_path: Path) -> None:
    def run(folder: Path) -> None:
        generate.run(GenerateSpec(base=base, prompts=("a",), adapters=(folder,)))

    with pytest.raises(ModelError, match=r"adapter_config.json is missing"):
        run(tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(adapters["lora"], broken)
    (broken / "adapter_model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match="broken does not fit"):
        run(broken)
    (broken / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match="broken"):
        run(broken)
    (broken / "adapter_config.json").write_text(json.dumps({"peft_type": "MAGIC"}))
    with pytest.raises(ModelError, match="broken"):
        run(broken)


def test_labels(base: str, adapters: dict[str, Path], tmp_path: Path) -> None:
    twin = tmp_path / "lora"
    shutil.copytree(adapters["lora"], twin)
    spec = GenerateSpec(
        base=base, prompts=("a",), adapters=(adapters["lora"], twin), max_new_tokens=1
    )
    assert {a.adapter for a in generate.run(spec)} == {str(adapters["lora"]), str(twin)}
    with pytest.raises(ModelError, match="given twice"):
        generate.run(GenerateSpec(base=base, prompts=("a",), adapters=(twin, twin)))


def test_nobody_answers(tmp_path: Path) -> None:
    with pytest.raises(ConnectionFailed, match="no executor answers"):
        generate.run(GenerateSpec(base=f"unix://{tmp_path}/x.sock", prompts=("a",)))


def test_a_model_without_a_tokenizer(model_folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    with symbiosis.Executor.of(model) as executor:
        (url,) = executor.listen([f"unix://{tmp_path}/bare.sock"])
        with pytest.raises(ModelError, match="ships no usable tokenizer"):
            generate.run(GenerateSpec(base=url, prompts=("a",)))
