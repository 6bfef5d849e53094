"""What an executor says that it hosts, and a client that holds it to that."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import tiny
from exchanges import weight_id
from symbiosis import Executor, connect
from symbiosis.errors import ModelError
from symbiosis.executor import digests
from symbiosis.executor.digests import ModelDigest
from symbiosis.executor.weights import Weights
from symbiosis.wire.digest import combined, read_entries, tensor_digest

QUERY = "0.self_attn.q_proj.weight"


def digest_of(model: PreTrainedModel | str, **options: object) -> str:
    if isinstance(model, str):
        return ModelDigest(Weights.load(model, **options)).wait()  # type: ignore[arg-type]
    return ModelDigest(Weights(model, "any name")).wait()


@pytest.fixture
def folder(tmp_path: Path) -> str:
    tiny.llama().save_pretrained(tmp_path / "llama")
    return str(tmp_path / "llama")


def test_a_folder_has_the_digest_of_its_copy(folder: str, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    assert digest_of(folder) == digest_of(str(copy))
    assert len(digest_of(folder)) == 64


def test_whatever_changes_an_answer_changes_it(folder: str, tmp_path: Path) -> None:
    found = {digest_of(folder), digest_of(folder, dtype=torch.bfloat16)}
    found.add(digest_of(folder, quantize="int8"))
    config = Path(folder, "config.json")
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    found.add(digest_of(folder))
    assert len(found) == 4


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_one_bit_of_a_parameter(name: str) -> None:
    model = tiny.llama()
    before = digest_of(model)
    with torch.no_grad():
        model.get_parameter(name).view(torch.int32).view(-1)[5] ^= 1
    assert digest_of(model) != before


def test_tensors_of_the_same_bytes_differ_by_shape_and_dtype() -> None:
    zeros = torch.zeros(6)
    forms = [zeros, zeros.view(2, 3), zeros.view(torch.int32), torch.zeros(3, dtype=torch.float64)]
    assert len({tensor_digest(form) for form in forms}) == 4


def test_the_list_must_add_up() -> None:
    entries = {"file:config.json": "1" * 64}
    assert read_entries({"digest": None}) is None
    assert read_entries({"digest": combined(entries), "entries": entries}) is not None
    for wrong in ({"digest": "0" * 64, "entries": entries}, {"digest": combined(entries)}):
        with pytest.raises(Exception, match="digest"):
            read_entries(wrong)


# A client that pins


def test_the_right_digest_opens(executor: Executor, base_url: str) -> None:
    expected = digest_of(tiny.llama())
    ids = tiny.tokens()
    with connect(base_url, expect_digest=expected) as session, torch.no_grad():
        assert session.digest == expected == session.welcome["digest"]
        assert torch.equal(session.model()(ids).logits, tiny.llama()(ids).logits)
        session.fetch(weight_id(executor, QUERY), "a test")


def test_another_model_is_left_before_anything_is_sent(executor: Executor, base_url: str) -> None:
    with pytest.raises(ModelError, match=r"hosts .* with the digest .*, not 0000"):
        connect(base_url, expect_digest="0" * 64)
    with connect(base_url) as session:
        assert [c["exchanges"] for c in session.executor_stats()["clients"].values()] == [0]


@pytest.mark.parametrize("what", ["parameter", "file", "weight"])
def test_what_arrives_is_compared(what: str, executor: Executor, base_url: str) -> None:
    """The executor claims the right digest and ships something else."""
    with connect(base_url, expect_digest=executor.digest.wait()) as session:
        match what:
            case "parameter":
                executor.weights.shipped["model.norm.weight"][3] += 1
                reads = session.model
            case "file":
                executor.weights.files["config.json"] += b" "
                reads = session.model
            case _:
                number = weight_id(executor, QUERY)
                executor.weights[number].tensor[0, 0] += 1

                def reads() -> object:
                    return session.fetch(number, "a test")

        with pytest.raises(ModelError, match="not the one in its digest"):
            reads()


def test_a_session_does_not_go_on_with_other_weights(tmp_path: Path) -> None:
    """The executor restarts at the same address: with the same weights it goes on, with others of
    the same shapes it does not, pinned or not."""
    url, ids = f"unix://{tmp_path}/base.sock", tiny.tokens()
    first = Executor.of(tiny.llama())
    first.listen([url])
    with connect(url) as session, torch.no_grad():
        model = session.model()
        before = model(ids).logits
        first.close()
        with Executor.of(tiny.llama()) as same:
            same.listen([url])
            assert torch.equal(model(ids).logits, before)
        with Executor.of(tiny.llama(seed=1)) as other:
            other.listen([url])
            with pytest.raises(ModelError, match="no longer hosts"):
                model(ids)


def test_a_client_waits_for_a_digest_that_takes_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is computed beside everything else: the executor listens and answers meanwhile."""
    go_on = threading.Event()

    def late(tensor: torch.Tensor) -> str:
        assert go_on.wait(30)
        return tensor_digest(tensor)

    monkeypatch.setattr(digests, "tensor_digest", late)
    url, opened = f"unix://{tmp_path}/base.sock", []
    with Executor.of(tiny.llama()) as base:
        base.listen([url])
        assert base.digest.ready is None
        waiting = threading.Thread(target=lambda: opened.append(connect(url)))
        waiting.start()
        while not base.answer(0, {"get": "stats"})[0]["clients"]:
            pass
        assert not opened
        go_on.set()
        waiting.join(30)
        assert opened[0].digest == digest_of(tiny.llama())
        opened[0].close()
