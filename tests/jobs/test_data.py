from __future__ import annotations

from pathlib import Path

import pytest

from symbiosis.errors import DataError
from symbiosis.jobs.data import Row, digest, read_rows, split

MESSAGES = '{"messages": [{"role": "user", "content": "hi"}]}'


def rows_of(tmp_path: Path, content: str | bytes) -> list[Row]:
    file = tmp_path / "train.jsonl"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_rows(file)


@pytest.mark.parametrize(
    ("line", "format"),
    [
        ('{"text": "a", "id": 7}', "text"),
        ('{"prompt": "", "completion": "b"}', "prompt-completion"),
        (
            '{"prompt": [{"role": "user", "content": "a"}],'
            ' "completion": [{"role": "assistant", "content": "b"}]}',
            "prompt-completion",
        ),
        (MESSAGES, "messages"),
    ],
)
def test_formats(tmp_path: Path, line: str, format: str) -> None:
    (row,) = rows_of(tmp_path, line)
    assert row.format == format
    assert "id" not in row.values
    assert row.where.endswith("train.jsonl:1")


def test_empty_lines_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, '\ufeff{"text": "é"}\r\n\r\n{"text": "b"}\r\n')
    assert [(row.line, row.values["text"]) for row in rows] == [(1, "é"), (3, "b")]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "not JSON"),
        ('{"text": "a"', "not JSON"),
        (b'{"text": "\xff"}', "not UTF-8"),
        ("[" * 100_000, "JSON"),
        ('"text"', "a JSON text where an object is wanted"),
        ("3", "a JSON number"),
        ("null", "a JSON null"),
        ("{}", "no keys"),
        ('{"txt": "a"}', "found 'txt'"),
        ('{"text": 3}', "'text' is a number"),
        ('{"text": true}', "'text' is a boolean"),
        ('{"text": null}', "'text' is a null"),
        ('{"text": ["a"]}', "'text' is a list"),
        ('{"text": "  "}', "'text' is empty"),
        ('{"prompt": "a"}', "'completion' is missing"),
        ('{"completion": "a"}', "'prompt' is missing"),
        ('{"prompt": "a", "completion": ""}', "'completion' is empty"),
        ('{"prompt": "a", "completion": {}}', "'completion' is a object"),
        ('{"prompt": "a", "completion": [{"role": "user", "content": "b"}]}', "both be texts"),
        ('{"text": "a", "messages": []}', "two formats"),
        ('{"messages": "a"}', "where a list of messages is wanted"),
        ('{"messages": []}', "empty list"),
        ('{"messages": ["a"]}', "messages[0] is a text"),
        ('{"messages": [{"role": "user"}]}', "messages[0] has no 'content'"),
        ('{"messages": [{"content": "a"}]}', "messages[0] has no 'role'"),
        ('{"messages": [{"role": "user", "content": 3}]}', "messages[0].content is a number"),
        ('{"messages": [{"role": "", "content": "a"}]}', "messages[0].role is empty"),
        ('{"messages": [{"role": "user", "content": " "}]}', "no content"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str | bytes, complaint: str) -> None:
    good = b'{"text": "fine"}\n'
    raw = line.encode() if isinstance(line, str) else line
    with pytest.raises(DataError) as caught:
        rows_of(tmp_path, good + good + raw + b"\n" + good)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'train.jsonl'}:3: ")
    assert complaint in message
    assert 'each line must be {"text": "..."}' in message
    assert "more malformed" not in message


def test_mixed_formats(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"jsonl:2: this is a messages example, but line 1 is a text"
    ):
        rows_of(tmp_path, '{"text": "a"}\n' + MESSAGES)


def test_further_malformed_lines_are_counted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"jsonl:1: .*7 more malformed: line 2, 3, 4, 5, 6, \.\.\."):
        rows_of(tmp_path, "{\n" * 8)


def test_files_without_examples(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no examples"):
        rows_of(tmp_path, "\n\n")
    with pytest.raises(DataError, match=r"cannot read .*none.jsonl: No such file"):
        read_rows(tmp_path / "none.jsonl")


def test_split(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "".join(f'{{"text": "{n}"}}\n' for n in range(40)))
    train, held_out = split(rows, 0.1, seed=1)
    assert len(held_out) == 4
    assert sorted([*train, *held_out], key=lambda row: row.line) == rows
    assert split(rows, 0.1, seed=1) == (train, held_out)
    assert split(rows, 0.1, seed=2) != (train, held_out)
    assert split(rows, 0, seed=1) == (rows, [])
    assert len(split(rows[:10], 0.01, seed=1)[1]) == 1
    assert split(rows[:9], 0.5, seed=1) == (rows[:9], [])


@pytest.mark.parametrize("fraction", [0.96, 0.999])
def test_something_is_left_to_train_on(tmp_path: Path, fraction: float) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("".join(f'{{"text": "row {n}"}}\n' for n in range(10)))
    train, held_out = split(read_rows(file), fraction, 1)
    assert (len(train), len(held_out)) == (1, 9)


def test_digest_tells_files_apart(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_text("1")
    second.write_text("2")
    assert digest(first) != digest(second)
