"""The error tree: stable unique codes, a docstring that tells the truth, readable texts."""

from __future__ import annotations

import re

import pytest

import shelora.errors
from shelora.errors import Exhausted, OffsetMismatch, SheLoraError, StorageFull, Unavailable, error_classes

BRANCH = re.compile(r"^[├└]── (\w+)")
NAME = re.compile(r"\b[A-Z][A-Za-z]+\b")


def subclasses(cls: type[SheLoraError]) -> list[type[SheLoraError]]:
    """Every class below `cls`, walked without going through codes."""
    found: list[type[SheLoraError]] = []
    for child in cls.__subclasses__():
        found += [child, *subclasses(child)]
    return found


ALL_CLASSES = [cls for cls in subclasses(SheLoraError) if cls.__module__.startswith("shelora.")]
ALL_CLASSES.append(SheLoraError)


def drawn_branches() -> dict[str, set[str]]:
    """The docstring's tree: the name of every branch with all names drawn below it."""
    branches: dict[str, set[str]] = {}
    current = ""
    for line in (shelora.errors.__doc__ or "").splitlines()[2:]:
        if match := BRANCH.match(line):
            current = match[1]
            branches[current] = set()
            branches[current].update(NAME.findall(line[match.end(1) :]))
        elif current:
            branches[current].update(NAME.findall(line))
    return branches


def test_error_classes_finds_every_class_of_the_module() -> None:
    defined = {cls for cls in vars(shelora.errors).values() if isinstance(cls, type) and issubclass(cls, SheLoraError)}
    assert set(error_classes().values()) >= defined
    assert set(ALL_CLASSES) == defined


def test_codes_are_unique() -> None:
    codes = [cls.code for cls in ALL_CLASSES]
    assert len(codes) == len(set(codes))


@pytest.mark.parametrize("cls", ALL_CLASSES, ids=lambda cls: cls.__name__)
def test_code_is_the_class_name_in_snake_case(cls: type[SheLoraError]) -> None:
    expected = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()
    if cls is SheLoraError:
        expected = "shelora_error"
    assert cls.code == expected
    assert re.fullmatch(r"[a-z]+(_[a-z]+)*", cls.code)
    assert error_classes()[cls.code] is cls
    assert cls.__doc__


def test_docstring_tree_lists_every_class_under_its_branch() -> None:
    real = {
        child.__name__: {cls.__name__ for cls in subclasses(child)}
        for child in SheLoraError.__subclasses__()
        if child.__module__ == "shelora.errors"
    }
    assert drawn_branches() == real


def test_retryable_is_inherited() -> None:
    assert {cls for cls in ALL_CLASSES if cls.retryable} == {
        OffsetMismatch,
        *[Exhausted, *subclasses(Exhausted)],
        *[Unavailable, *subclasses(Unavailable)],
    }


def test_text_without_hint_is_the_message() -> None:
    assert str(StorageFull("expected 10 free bytes, got 3")) == "expected 10 free bytes, got 3"


def test_text_with_hint_ends_in_the_hint() -> None:
    error = StorageFull("expected 10 free bytes, got 3", hint="make room")
    assert str(error) == "expected 10 free bytes, got 3 (make room)"
    assert (error.message, error.hint) == ("expected 10 free bytes, got 3", "make room")


def test_context_is_a_copy() -> None:
    context = {"agent": "a"}
    error = SheLoraError("text", context=context)
    context["agent"] = "b"
    assert error.context == {"agent": "a"}
    assert SheLoraError("text").context == {}
