"""A helper on another host: its own key and authority, and nothing that is the executor's."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import tiny
from certificates import Files, make
from symbiosis import Executor, Privacy, Tls, connect
from symbiosis.errors import AuthenticationFailed, ConnectionFailed, PrivacyError
from symbiosis.executor import keystore
from symbiosis.executor.weights import Weights

IDS = tiny.tokens()


class Operator(NamedTuple):
    """An executor behind TLS and keys, as it is listened on beyond the host."""

    url: str
    key: str
    files: Files

    @property
    def tls(self) -> Tls:
        return self.files.trusting()


@pytest.fixture(scope="module")
def operators(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Operator, Operator]]:
    """Two that share nothing but the weights."""
    found, executors = [], []
    for name in ("first", "second"):
        folder = tmp_path_factory.mktemp(name)
        files, store = make(folder / "pem"), folder / "keys.json"
        key, _ = keystore.create(store, "ann")
        executors.append(Executor(Weights(tiny.llama(), "tiny"), masked=(8,), keys=store))
        (url,) = executors[-1].listen(["tls://127.0.0.1:0"], tls=files.serving())
        found.append(Operator(url, key, files))
    yield found[0], found[1]
    for executor in executors:
        executor.close()


def test_a_helper_behind_tls_and_keys(operators: tuple[Operator, Operator]) -> None:
    first, second = operators
    with connect(first.url, key=first.key, tls=first.tls, privacy="masked-local") as session:
        wanted = session.model()(IDS).logits
    split = Privacy(mode="masked-split", helper=second.url)
    with connect(
        first.url,
        key=first.key,
        tls=first.tls,
        privacy=split,
        helper_key=second.key,
        helper_tls=second.tls,
    ) as session:
        assert torch.equal(session.model()(IDS).logits, wanted)
        with pickle.loads(pickle.dumps(session)) as copy:  # noqa: S301 - our own
            assert torch.equal(copy.model()(IDS).logits, wanted)
        said = f"{session!r} {session.privacy_report()} {split}"
        assert first.key not in said and second.key not in said


def test_a_helper_gets_nothing_of_the_executors(operators: tuple[Operator, Operator]) -> None:
    first, second = operators
    split = Privacy(mode="masked-split", helper=second.url)
    terms = {"key": first.key, "tls": first.tls, "privacy": split, "retry_s": 0}
    with pytest.raises(AuthenticationFailed):
        connect(first.url, **terms, helper_tls=second.tls)  # type: ignore[arg-type]
    with pytest.raises(AuthenticationFailed):
        connect(first.url, **terms, helper_tls=second.tls, helper_key=first.key)  # type: ignore[arg-type]
    with pytest.raises(ConnectionFailed, match="is not trusted"):
        connect(first.url, **terms, helper_key=second.key)  # type: ignore[arg-type]


def test_one_authority_for_both_needs_no_more(operators: tuple[Operator, Operator]) -> None:
    _, second = operators
    split = Privacy(mode="masked-split", helper=second.url)
    with Executor(Weights(tiny.llama(), "tiny"), masked=(8,)) as executor:
        (url,) = executor.listen(["tls://127.0.0.1:0"], tls=second.files.serving())
        with connect(url, tls=second.tls, privacy=split, helper_key=second.key) as session:
            session.model()(IDS)


def test_keys_of_masks_are_not_sent_in_the_clear(tmp_path: Path) -> None:
    """As an API key would not be; before anybody is asked for anything."""
    split = Privacy(mode="masked-split", helper="tcp://192.0.2.1:7420")
    with pytest.raises(PrivacyError, match=r"not sent to tcp://192\.0\.2\.1:7420.*tls://192\.0"):
        connect(f"unix://{tmp_path}/nobody.sock", privacy=split)


@pytest.mark.parametrize("given", [{"helper_key": "k"}, {"helper_tls": Tls()}])
def test_what_is_for_a_helper_wants_one(tmp_path: Path, given: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="helper of masked-split"):
        connect(f"unix://{tmp_path}/nobody.sock", privacy="masked-local", **given)  # type: ignore[arg-type]
