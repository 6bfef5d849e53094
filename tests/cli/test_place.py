"""`symbiosis place` against a real executor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from command_line import Outcome, Served

Call = Callable[..., Outcome]


def test_the_command(call: Call, served: Served) -> None:
    url = served.unix
    outcome = call("place", "--base", url, "--context", 4096, "--batch", 2, "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    best = found["options"][0]
    assert (found["context"], found["batch"], best["device"]) == (4096, 2, "cpu")
    assert best["fits"] and best["token_s"] > 0 and best["cache_bytes"] > 0

    table = call("place", "--base", url, "--context", 4096, "--device", "cpu").out
    assert "ms/token" in table and "base.model(device='cpu')" in table

    missing = call("place", "--base", url, "--context", 10, "--device", "cuda:99")
    assert missing.code == 2 and "there is no cuda:99 here" in missing.err


def test_a_folder_without_an_adapter_is_named(call: Call, served: Served, tmp_path: Path) -> None:
    outcome = call(
        "place", "--base", served.unix, "--context", 100, "--adapter", tmp_path / "nothing"
    )
    assert "adapter_config.json is missing" in outcome.error
