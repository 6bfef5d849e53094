"""Groups of products on one input: learned by watching, forgotten when they are not used."""

from __future__ import annotations

from symbiosis.client.groups import InputGroups


def watch(groups: InputGroups, *steps: tuple[object, str]) -> None:
    for input_key, members in steps:
        for member in members:
            groups.observe(input_key, member)


def test_a_run_on_one_input_is_remembered_by_its_first() -> None:
    groups = InputGroups()
    watch(groups, (1, "qkv"), (2, "o"), (3, "gu"))
    assert groups.members("q") == ("q", "k", "v")
    assert groups.members("k") == ("k",)
    assert groups.members("o") == ("o",)
    assert groups.members("g") == ("g",), "its run may still go on"
    watch(groups, (4, "d"))
    assert groups.members("g") == ("g", "u")


def test_a_group_that_stops_being_used_is_forgotten() -> None:
    groups = InputGroups()
    watch(groups, (1, "qkv"), (2, "o"), (3, "q"), (4, "o"))
    assert groups.members("q") == ("q",)


def test_a_group_becomes_what_was_seen_last() -> None:
    groups = InputGroups()
    watch(groups, (1, "qkv"), (2, "o"), (3, "qk"), (4, "o"))
    assert groups.members("q") == ("q", "k")
    watch(groups, (5, "qkvw"), (6, "o"))
    assert groups.members("q") == ("q", "k", "v", "w")


def test_a_member_is_asked_for_once() -> None:
    groups = InputGroups()
    watch(groups, (1, "qqkq"), (2, "o"))
    assert groups.members("q") == ("q", "k")


def test_an_input_without_an_identity_groups_nothing() -> None:
    groups = InputGroups()
    watch(groups, (None, "qkv"), (None, "qkv"), (1, "o"))
    assert groups.members("q") == ("q",)


def test_an_unknown_leader_is_alone() -> None:
    assert InputGroups().members("q") == ("q",)
