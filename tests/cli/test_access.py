"""Keys, certificates and administration as users run them: real processes."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from certificates import make
from command_line import Outcome, finish, run, start
from symbiosis import Executor
from symbiosis.executor import keystore

Call = Callable[..., Outcome]


def test_the_whole_story(model_folder: Path, train_file: Path, tmp_path: Path) -> None:
    """Keys, an executor behind TLS, a fine-tuning run, a generation, administration, the end."""
    files = make(tmp_path / "pem")
    store, admin = tmp_path / "keys.json", f"unix://{tmp_path}/admin.sock"
    made = run("keys", "create", "ann", "--store", store)
    key_file = tmp_path / "ann.key"
    key_file.write_text(made.out)
    assert made.code == 0 and "not shown again" in made.err
    process = start(
        *("serve", model_folder, "--listen", "tls://127.0.0.1:0", "--threads", 1),
        *("--tls-cert", files.server, "--keys", store, "--admin", admin),
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line.split())
        if line == "ready\n":
            break
    (url,) = (words[1] for words in lines if words[:1] == ["listening"])
    assert url.startswith("tls://127.0.0.1:"), lines
    trusted = ("--base", url, "--tls-ca", files.ca)
    allowed = (*trusted, "--key-file", key_file)
    try:
        out = tmp_path / "adapter"
        trained = run("finetune", *allowed, "--data", train_file, "--out", out, "--steps", 2)
        assert trained.code == 0, trained
        secret = made.out.strip()
        for path in (*out.rglob("*.json"), *out.rglob("*.jsonl")):
            assert secret not in path.read_text()
        answered = run(
            "generate", *allowed, "--adapter", out, "--prompt", "a", "--max-new-tokens", 3
        )
        assert answered.code == 0 and secret not in answered.out + answered.err
        shown = run("status", *allowed, "--once")
        assert shown.code == 0 and "tenant ann:" in shown.out
        assert "does not know you" in run("status", *trusted, "--once").error
        assert "is not trusted" in run("status", "--base", url, "--once").error
        status = json.loads(run("admin", "status", "--socket", admin).out)
        assert status["clients_seen"] >= 3
        tenants = json.loads(run("admin", "tenants", "--socket", admin).out)
        assert tenants["ann"]["executor_s"] > 0
        (key_id,) = (
            line.split()[0] for line in run("keys", "list", "--store", store).out.splitlines()
        )
        assert run("keys", "revoke", key_id, "--store", store).code == 0
        assert "has been read; 0 sessions ended" in run("admin", "reload", "--socket", admin).out
        assert "does not know you" in run("status", *allowed, "--once").error
        assert "0 go on" in run("admin", "drain", "--socket", admin).out
        assert "no client 7" in run("admin", "disconnect", 7, "--socket", admin).error
    finally:
        process.terminate()
        ended = finish(process)
    assert ended.code == 0 and secret not in ended.out + ended.err
    assert not os.path.exists(admin.removeprefix("unix://"))


def test_a_key_in_the_environment(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is taken, and it too is not sent in the clear beyond the host."""
    monkeypatch.setenv("SYMBIOSIS_KEY", "secret-of-mine")
    outcome = call("status", "--base", "tcp://192.0.2.1:7420", "--once")
    assert "the key is not sent to tcp://192.0.2.1:7420" in outcome.error
    assert "secret-of-mine" not in outcome.err + outcome.out


def test_keys_are_made_listed_and_revoked(call: Call, tmp_path: Path) -> None:
    store = tmp_path / "keys.json"
    first = call("keys", "create", "ann", "--store", store)
    second = call("keys", "create", "bob", "--store", store, "--days", 0)
    assert first.code == second.code == 0
    assert stat.S_IMODE(store.stat().st_mode) == 0o600
    assert first.out.strip() not in store.read_text()
    listed = call("keys", "list", "--store", store).out.splitlines()
    assert "ann" in listed[0] and "until revoked" in listed[0]
    assert "bob" in listed[1] and "(expired)" in listed[1]
    assert call("keys", "revoke", listed[0].split()[0], "--store", store).code == 0
    assert "no key" in call("keys", "list", "--store", store).out
    assert "has no key 'zzz'" in call("keys", "revoke", "zzz", "--store", store).error
    assert "cannot read the key store" in call("keys", "list", "--store", tmp_path / "no").error


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--listen", "tcp://0.0.0.0:0"), "is not encrypted"),
        (("--listen", "tls://0.0.0.0:0", "--tls-cert", "PEM"), "asks nobody who they are"),
        (("--listen", "tls://127.0.0.1:0"), "needs a certificate"),
        (("--listen", "tls://127.0.0.1:0", "--tls-cert", "nothing.pem"), "nothing.pem"),
        (("--keys", "nothing.json"), "cannot read the key store nothing.json"),
        (("--admin", "tcp://127.0.0.1:0"), "unix:///path.sock only"),
    ],
)
def test_bad_doors_are_refused_before_anything_is_loaded(
    call: Call, tmp_path: Path, options: tuple[str, ...], complaint: str
) -> None:
    pem = str(make(tmp_path).server)
    given = [pem if option == "PEM" else option for option in options]
    outcome = call("serve", "no-such-model", *given)
    assert complaint in outcome.error
    assert "loading" not in outcome.out


def test_options_that_belong_together(call: Call, tmp_path: Path) -> None:
    assert call("serve", "m", "--tls-client-ca", tmp_path / "x").code == 2
    assert call("status", "--base", "tls://h:1", "--tls-key", tmp_path / "x").code == 2


@pytest.mark.parametrize("content", ["", "\n", "two keys", "a\nb\n"])
def test_a_key_file_holds_one_key(call: Call, tmp_path: Path, content: str) -> None:
    path = tmp_path / "key"
    path.write_text(content)
    outcome = call("status", "--base", "unix:///nowhere.sock", "--key-file", path)
    assert "does not hold one key" in outcome.error
    assert (
        "cannot read the key"
        in call("status", "--base", "unix:///nowhere.sock", "--key-file", tmp_path / "none").error
    )


def test_a_key_for_the_helper_alone(call: Call, model_folder: Path, tmp_path: Path) -> None:
    """It is read from its file and goes to the helper; the executor's own does not."""
    key, _ = keystore.create(tmp_path / "keys.json", "ann")
    (tmp_path / "key").write_text(key)
    with (
        Executor.load(str(model_folder), masked=(8,)) as executor,
        Executor.load(str(model_folder), masked=(8,), keys=tmp_path / "keys.json") as helper,
    ):
        (url,) = executor.listen([f"unix://{tmp_path}/1.sock"])
        (helper_url,) = helper.listen([f"unix://{tmp_path}/2.sock"])
        asked = (
            *("generate", "--base", url, "--prompt", "a", "--max-new-tokens", 2),
            *("--privacy", "masked-split", "--privacy-helper", helper_url),
        )
        refused = call(*asked, "--key-file", tmp_path / "key")
        assert refused.code == 1 and "does not know you" in refused.error
        answered = call(*asked, "--privacy-helper-key-file", tmp_path / "key")
        assert answered.code == 0 and key not in answered.out + answered.err
