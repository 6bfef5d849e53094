"""The dtype that a model's products are computed in where nobody says which."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tiny
from symbiosis.errors import ModelError
from symbiosis.executor import weights as weights_module
from symbiosis.executor.fastest import fastest_dtype, timed
from symbiosis.executor.weights import Weights

CPU = torch.device("cpu")


def taking(seconds: dict[torch.dtype, float]) -> Callable[[Callable[[], object], object], float]:
    """A timer by which products take so long in each dtype; what is timed runs."""

    def timer(call: Callable[[], object], device: object) -> float:
        products = call()
        assert isinstance(products, list)
        return seconds[products[0].dtype] * products[0].shape[0]

    return timer


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("stored_s", "float32_s", "faster"),
    [(4.0, 1.0, True), (1.0, 4.0, False), (1.0, 1.0, False), (1.05, 1.0, False), (1.2, 1.0, True)],
)
def test_what_takes_less_time_and_is_worth_its_memory(
    stored: torch.dtype, stored_s: float, float32_s: float, faster: bool
) -> None:
    timer = taking({stored: stored_s, torch.float32: float32_s})
    found = fastest_dtype(tiny.llama().to(stored), CPU, timer)
    assert found == (torch.float32 if faster else stored)


def test_few_rows_and_many_count_alike() -> None:
    """Half the time for a row, and three times that for a prompt."""
    stored = torch.bfloat16

    def timer(call: Callable[[], object], device: object) -> float:
        products = call()
        assert isinstance(products, list)
        one_row = products[0].shape[0] == 1
        if products[0].dtype == torch.float32:
            return 1.0
        return 2.0 if one_row else 1 / 3

    assert fastest_dtype(tiny.llama().to(stored), CPU, timer) == stored


def test_a_slow_round_is_not_the_measure() -> None:
    times = iter([9.0, 1.0, 1.0, 4.0] * 100)  # of bfloat16, float32, bfloat16, ...
    assert fastest_dtype(tiny.llama().bfloat16(), CPU, lambda call, device: next(times)) == (
        torch.bfloat16
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_exact_stays(dtype: torch.dtype) -> None:
    def timer(call: object, device: object) -> float:
        raise AssertionError("nothing is to be measured")

    assert fastest_dtype(tiny.llama().to(dtype), CPU, timer) == dtype


def test_the_model_stays_as_it_is() -> None:
    model = tiny.llama().bfloat16()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert fastest_dtype(model, CPU) in (torch.bfloat16, torch.float32)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_call_is_timed_to_its_end() -> None:
    ran = []
    assert 0 < timed(lambda: ran.append(1), CPU) < 60
    assert ran == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_is_loaded_in_the_dtype_that_was_found(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.llama().bfloat16().save_pretrained(tmp_path)
    monkeypatch.setattr(weights_module, "fastest_dtype", lambda model, device: dtype)
    found = Weights.load(str(tmp_path), dtype="fastest")
    wanted = Weights.load(str(tmp_path), dtype=dtype)
    assert found.dtype == dtype
    assert all(torch.equal(found[w.id].tensor, w.tensor) for w in wanted)
    assert found.shipped.keys() == wanted.shipped.keys()
    assert all(torch.equal(found.shipped[name], wanted.shipped[name]) for name in wanted.shipped)


def test_a_folder_that_is_none() -> None:
    with pytest.raises(ModelError):
        Weights.load("./nothing", dtype="fastest")
