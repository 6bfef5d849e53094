"""Model folders that cannot be hosted: one sentence that says why, before anything is served."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import tiny_files
from symbiosis import Executor
from symbiosis.errors import ModelError

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def cut(name: str, keep: float) -> Callable[[Path], None]:
    """As a copy that was interrupted."""

    def do(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * keep)])

    return do


def settings(**changes: object) -> Callable[[Path], None]:
    """Change the configuration; None removes a key."""

    def do(folder: Path) -> None:
        found = json.loads((folder / CONFIG).read_text())
        found.update(changes)
        kept = {key: value for key, value in found.items() if value is not None}
        (folder / CONFIG).write_text(json.dumps(kept))

    return do


def unreadable(name: str) -> Callable[[Path], None]:
    """A folder in its place: root may read any file."""

    def do(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return do


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (remove(WEIGHTS), "no file named model.safetensors"),
    "truncated weights": (cut(WEIGHTS, 0.5), "damaged or was not copied to its end"),
    "empty weights": (cut(WEIGHTS, 0), "damaged or was not copied to its end"),
    "unreadable weights": (unreadable(WEIGHTS), "no file named model.safetensors"),
    "no configuration": (remove(CONFIG), "model_type"),
    "truncated configuration": (cut(CONFIG, 0.5), "not a valid JSON"),
    "unreadable configuration": (unreadable(CONFIG), "model_type"),
    "no model type": (settings(model_type=None), "model_type"),
    "unknown model type": (settings(model_type="nonsense"), "nonsense"),
    "unknown class": (settings(architectures=["Nope"]), "no model class 'Nope'"),
    "wrong sizes": (
        settings(intermediate_size=32),
        r"6 of its weights do not have the shapes .* which is \[64, 128\] in the files and "
        r"should be \[64, 32\]",
    ),
    "missing size": (settings(hidden_size=None), "do not have the shapes"),
    "size of a wrong type": (settings(hidden_size="many"), "hidden_size"),
    "heads that do not divide": (settings(num_attention_heads=7), "attention heads"),
    "more layers than weights": (settings(num_hidden_layers=3), "lack 9 weights"),
    "unknown dtype": (settings(dtype="float17"), "float17"),
    "no vocabulary": (settings(vocab_size=0), "cannot host"),
    "nothing in it": (lambda folder: remove(*(p.name for p in folder.iterdir()))(folder), "model"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_files.build_model(tmp_path_factory.mktemp("models") / "good")


@pytest.mark.parametrize("case", BAD)
def test_a_bad_folder_is_refused_with_the_reason(good: Path, tmp_path: Path, case: str) -> None:
    damage, told = BAD[case]
    folder = Path(shutil.copytree(good, tmp_path / "model"))
    damage(folder)
    with pytest.raises(ModelError, match=told) as refused:
        Executor.load(str(folder))
    assert str(refused.value).startswith(f"cannot host {str(folder)!r}: ")


@pytest.mark.parametrize("what", ["nothing", "file"])
def test_no_folder(tmp_path: Path, what: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="there is no such folder"):
        Executor.load(str(tmp_path / what))


def test_weights_that_the_model_has_no_use_for_are_named(
    good: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "model"))
    settings(num_hidden_layers=1)(folder)
    with caplog.at_level(logging.WARNING):
        Executor.load(str(folder))
    assert "9 weights in its files are not part of the model" in caplog.text
