"""Data sets of JSON lines: every line is checked before anything else of a job starts.

Three formats, one per file set: ``{"text"}``, ``{"prompt", "completion"}`` (texts, or lists of
chat messages) and ``{"messages": [{"role", "content"}]}``. Other keys are ignored, empty lines
too. Knows files and JSON; knows no tokenizer (see `symbiosis.jobs.encode`).
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from symbiosis.errors import DataError

Format = Literal["text", "prompt-completion", "messages"]

ACCEPTED = (
    'each line must be {"text": "..."} or {"prompt": "...", "completion": "..."} or '
    '{"messages": [{"role": "user", "content": "..."}, ...]}'
)

_KEYS: dict[Format, tuple[str, ...]] = {
    "text": ("text",),
    "prompt-completion": ("prompt", "completion"),
    "messages": ("messages",),
}


@dataclass(frozen=True)
class Row:
    """One line that has been checked: the keys of its format are there and well-formed."""

    file: Path
    line: int
    format: Format
    values: dict[str, Any]

    @property
    def where(self) -> str:
        """For messages: ``train.jsonl:17``."""
        return f"{self.file}:{self.line}"


def read_rows(file: Path) -> list[Row]:
    """All rows of a file.

    Raises DataError that names the file and line of the first malformed one, says what is wrong
    and what is accepted, and counts the others.
    """
    rows: list[Row] = []
    problems: list[tuple[int, str]] = []
    for number, raw in _lines(file):
        try:
            row = Row(file, number, *_parsed(raw))
            if rows and row.format != rows[0].format:
                raise ValueError(
                    f"this is a {row.format} example, but line {rows[0].line} is a "
                    f"{rows[0].format} one; a file must keep to one format"
                )
            rows.append(row)
        except ValueError as error:
            problems.append((number, str(error)))
    if problems:
        raise DataError(_complaint(file, problems))
    if not rows:
        raise DataError(f"{file} holds no examples; {ACCEPTED}")
    return rows


def split(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows held out, chosen by ``seed``; both keep the file's order.

    At least one row is held out if ``fraction`` is above 0 and there are ten rows or more; with
    fewer, none is. At least one is left to train on.
    """
    count = 0
    if fraction > 0 and len(rows) >= 10:
        count = min(max(1, round(len(rows) * fraction)), len(rows) - 1)
    held_out = set(random.Random(seed).sample(range(len(rows)), count))
    return (
        [row for index, row in enumerate(rows) if index not in held_out],
        [row for index, row in enumerate(rows) if index in held_out],
    )


def digest(file: Path) -> str:
    """SHA-256 of a file, so that a resumed run can tell that its data are the same."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with file.open("rb") as opened:
            for number, raw in enumerate(opened, 1):
                if raw.strip():
                    yield number, raw
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from None


def _parsed(raw: bytes) -> tuple[Format, dict[str, Any]]:
    """Raises ValueError with what is wrong."""
    try:
        found = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("not usable JSON: nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"a JSON {_kind(found)} where an object is wanted")
    format = _format_of(found)
    if format == "messages":
        _check_messages(found["messages"], "messages")
    else:
        _check_texts(found, _KEYS[format])
    return format, {key: found[key] for key in _KEYS[format]}


def _format_of(found: dict[str, Any]) -> Format:
    formats = [format for format, keys in _KEYS.items() if any(key in found for key in keys)]
    if not formats:
        keys = ", ".join(map(repr, found)) or "no keys"
        raise ValueError(f"none of the keys text, prompt, messages is there (found {keys})")
    if len(formats) > 1:
        raise ValueError(f"the keys of two formats at once: {' and '.join(formats)}")
    missing = [key for key in _KEYS[formats[0]] if key not in found]
    if missing:
        raise ValueError(f"the key {missing[0]!r} is missing")
    return formats[0]


def _check_texts(found: dict[str, Any], keys: Sequence[str]) -> None:
    if len(keys) == 2 and isinstance(found[keys[0]], list) != isinstance(found[keys[1]], list):
        raise ValueError("prompt and completion must both be texts or both be lists of messages")
    for key in keys:
        value = found[key]
        if isinstance(value, list) and len(keys) == 2:
            _check_messages(value, key)
        elif not isinstance(value, str):
            raise ValueError(f"{key!r} is a {_kind(value)} where a text is wanted")
        elif not value.strip() and key != "prompt":
            raise ValueError(f"{key!r} is empty")


def _check_messages(messages: object, key: str) -> None:
    if not isinstance(messages, list):
        raise ValueError(f"{key!r} is a {_kind(messages)} where a list of messages is wanted")
    if not messages:
        raise ValueError(f"{key!r} is an empty list")
    for index, message in enumerate(messages):
        where = f"{key}[{index}]"
        if not isinstance(message, dict):
            raise ValueError(f"{where} is a {_kind(message)} where a message object is wanted")
        for part in ("role", "content"):
            if part not in message:
                raise ValueError(f"{where} has no {part!r}")
            if not isinstance(message[part], str):
                raise ValueError(f"{where}.{part} is a {_kind(message[part])}, not a text")
        if not message["role"]:
            raise ValueError(f"{where}.role is empty")
    if not any(message["content"].strip() for message in messages):
        raise ValueError(f"{key!r} has no content")


def _kind(value: object) -> str:
    names = {bool: "boolean", int: "number", float: "number", str: "text", list: "list"}
    return "null" if value is None else names.get(type(value), "object")


def _complaint(file: Path, problems: list[tuple[int, str]]) -> str:
    line, reason = problems[0]
    others = ""
    if len(problems) > 1:
        lines = ", ".join(str(number) for number, _ in problems[1:6])
        more = ", ..." if len(problems) > 6 else ""
        others = f" ({len(problems) - 1} more malformed: line {lines}{more})"
    return f"{file}:{line}: {reason}; {ACCEPTED}{others}"
