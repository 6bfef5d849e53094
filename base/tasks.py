#!/usr/bin/env python3
"""Five small tasks for trying adapters out on the base model.

Each task turns a line of English into something of a strict form, which the base model does not
do by itself and an adapter learns in a few dozen steps:

    sql        a request           ->  a SELECT statement
    json       facts on a person   ->  a JSON record
    log        an event            ->  a log line of key=value pairs
    unittest   a function's cases  ->  assertEqual lines
    html       a page element      ->  the tag

The examples are made up on the spot, from nothing but a seed:

    python base/tasks.py --task sql --count 400 --seed 0 --out sql.jsonl
    python base/tasks.py --task sql --count 64 --seed 1 --out sql-held-out.jsonl

Two different seeds from 0 to 15 never share a prompt.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

HANDS = 16  # the prompts are dealt to this many hands, and a seed picks from one of them


def words(text: str) -> list[str]:
    return text.split()


# sql ----------------------------------------------------------------------------------------

TABLES = {
    "users": (["name", "email", "address"], ["age", "level"]),
    "files": (["name", "path", "type"], ["size", "lines"]),
    "orders": (["date", "state", "user"], ["total", "count"]),
    "books": (["title", "author", "code"], ["length", "year"]),
    "jobs": (["name", "state", "host"], ["time", "level"]),
    "messages": (["title", "source", "date"], ["size", "number"]),
    "tests": (["name", "module", "result"], ["time", "count"]),
    "modules": (["name", "version", "path"], ["size", "length"]),
}
COMPARISONS = {"above": ">", "below": "<", "equal to": "="}


def sql(rng: Random) -> tuple[str, str]:
    table = rng.choice(list(TABLES))
    texts, numbers = TABLES[table]
    first, second = rng.sample(texts + numbers, 2)
    column, comparison = rng.choice(numbers), rng.choice(list(COMPARISONS))
    value = rng.randrange(2, 100)
    request = f"Get {first} and {second} of {table} with {column} {comparison} {value}"
    query = (
        f"SELECT {first}, {second} FROM {table} WHERE {column} {COMPARISONS[comparison]} {value}"
    )
    order = rng.choice([None, *texts])
    if order:
        request += f", by {order}"
        query += f" ORDER BY {order}"
    return f"{request}.\n", f"{query};"


# json ---------------------------------------------------------------------------------------

PEOPLE = words(
    "Ada Alan Ann Ben Bob Carl Dan Don Ed Eric Eve Fred Grace Guido Jack Jane Jim Joe Ken "
    "Lee Mark Mary Max Mike Nick Paul Peter Rob Ron Sam Steve Ted Tim Tom Will"
)
PLACES = words("Berlin Boston Dublin London Madrid Oslo Paris Prague Rome Texas India Italy Spain")
WORK = words("builder cook doctor helper manager player reader runner tester worker writer")


def json_record(rng: Random) -> tuple[str, str]:
    name, age = rng.choice(PEOPLE), rng.randrange(18, 90)
    place, work = rng.choice(PLACES), rng.choice(WORK)
    facts = rng.choice(
        [
            f"{name} is {age}, lives in {place} and works as a {work}.",
            f"{name} works as a {work} in {place} and is {age}.",
            f"A {work} from {place}, age {age}, is called {name}.",
        ]
    )
    return f"{facts}\n", json.dumps({"name": name, "age": age, "place": place, "work": work})


# log ----------------------------------------------------------------------------------------

SERVERS = words("mail web cache backup search queue index proxy")
ACTIONS = words("open read write close send remove update copy")
TARGETS = words("config data index cache lock session report archive message header")
SUFFIXES = words("txt db log xml json zip")
OUTCOMES = {
    "was able to {} {}": "INFO",
    "took too long to {} {}": "WARNING",
    "failed to {} {}": "ERROR",
}


def log(rng: Random) -> tuple[str, str]:
    server, action = rng.choice(SERVERS), rng.choice(ACTIONS)
    target = f"{rng.choice(TARGETS)}.{rng.choice(SUFFIXES)}"
    outcome, level = rng.choice(list(OUTCOMES.items()))
    time = f"{rng.randrange(24):02}:{rng.randrange(60):02}"
    event = f"At {time} the {server} server {outcome.format(action, target)}."
    return f"{event}\n", f"[{time}] {level} server={server} action={action} file={target}"


# unittest -----------------------------------------------------------------------------------

FUNCTIONS: dict[str, Callable[[int], object]] = {
    "double": lambda n: 2 * n,
    "triple": lambda n: 3 * n,
    "next": lambda n: n + 1,
    "previous": lambda n: n - 1,
    "negate": lambda n: -n,
    "half": lambda n: n // 2,
    "even": lambda n: n % 2 == 0,
    "odd": lambda n: n % 2 == 1,
    "text": str,
    "real": float,
    "list": lambda n: [n],
    "digit": lambda n: n % 10,
}


def unittest(rng: Random) -> tuple[str, str]:
    name = rng.choice(list(FUNCTIONS))
    function = FUNCTIONS[name]
    cases = [(value, function(value)) for value in rng.sample(range(100), 2)]
    told = ", ".join(f"{value} gives {result!r}" for value, result in cases)
    lines = [f"self.assertEqual({name}({value}), {result!r})" for value, result in cases]
    return f"{name}(n): {told}.\n", "\n".join(lines)


# html ---------------------------------------------------------------------------------------

FIRST_WORDS = words("First Last New Old Main Next Open Public User Simple Source Test Full")
SECOND_WORDS = words("page file list table report message index name value section archive event")
CLASSES = words("main small large long short simple plain special")


def html(rng: Random) -> tuple[str, str]:
    text = f"{rng.choice(FIRST_WORDS)} {rng.choice(SECOND_WORDS)}"
    look = rng.choice(CLASSES)
    kind = rng.choice(["link", "button", "heading", "image"])
    target = f"{rng.choice(TARGETS)}.{rng.choice(['html', 'php', 'txt', 'xml'])}"
    level, size = rng.randrange(1, 7), rng.randrange(10, 100)
    if kind == "link":
        request = f'A {look} link to {target} saying "{text}"'
        tag = f'<a class="{look}" href="{target}">{text}</a>'
    elif kind == "button":
        request = f'A {look} button named {target} saying "{text}"'
        tag = f'<button class="{look}" name="{target}">{text}</button>'
    elif kind == "heading":
        request = f'A {look} heading of level {level} saying "{text}"'
        tag = f'<h{level} class="{look}">{text}</h{level}>'
    else:
        request = f'A {look} image, {size} wide, showing "{text}"'
        tag = f'<img class="{look}" width="{size}" alt="{text}">'
    return f"{request}.\n", tag


# --------------------------------------------------------------------------------------------

TASKS: dict[str, Callable[[Random], tuple[str, str]]] = {
    "sql": sql,
    "json": json_record,
    "log": log,
    "unittest": unittest,
    "html": html,
}


def hand(prompt: str) -> int:
    """The hand that a prompt belongs to, the same on every machine."""
    return hashlib.sha256(prompt.encode()).digest()[0] % HANDS


def make(task: str, count: int, seed: int) -> list[dict[str, str]]:
    """Return `count` examples of a task, all different, always the same ones for a seed.

    Seeds that differ modulo 16 share no prompt at all, so one seed can serve for training and
    another for the held-out set.
    """
    generate = TASKS[task]
    rng = Random(f"{task}-{seed}")
    examples: dict[str, str] = {}
    for _ in range(1000 + 200 * count):
        if len(examples) >= count:
            break
        prompt, completion = generate(rng)
        if hand(prompt) == seed % HANDS:
            examples.setdefault(prompt, completion)
    else:
        raise ValueError(f"{task!r} has too few combinations for {count} different prompts")
    return [{"prompt": prompt, "completion": text} for prompt, text in examples.items()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=list(TASKS), required=True)
    parser.add_argument("--count", type=int, default=400, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="a .jsonl file (default: standard output)")
    args = parser.parse_args()
    lines = "".join(
        f"{json.dumps(example)}\n" for example in make(args.task, args.count, args.seed)
    )
    if args.out:
        args.out.write_text(lines, encoding="utf-8")
    else:
        sys.stdout.write(lines)


if __name__ == "__main__":
    main()
