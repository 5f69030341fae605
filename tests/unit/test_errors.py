"""Error codes are stable, and the tree in the docstring of `app.errors` documents them."""

import re
from itertools import chain

import pytest

from app import errors
from app.errors import OrdersError, RequestError, Unavailable


def descendants(cls: type[OrdersError]) -> list[type[OrdersError]]:
    return [cls, *chain.from_iterable(map(descendants, cls.__subclasses__()))]


def drawing() -> dict[str, tuple[str | None, str]]:
    """Parse the docstring: name of each class → (name of its parent, text beside it)."""
    branch: list[str] = []
    drawn: dict[str, tuple[str | None, str]] = {}
    for line in (errors.__doc__ or "").splitlines():
        if found := re.fullmatch(r"((?:[│├└─ ]{4})*)([A-Z]\w+) *(.*)", line):
            depth = len(found[1]) // 4
            branch[depth:] = [found[2]]
            drawn[found[2]] = (branch[depth - 1] if depth else None, found[3])
    return drawn


CLASSES = [cls for cls in descendants(OrdersError) if cls.__module__ == errors.__name__]


def test_every_class_has_its_own_code() -> None:
    """No two classes share a code."""
    assert all("code" in vars(cls) for cls in CLASSES)
    assert len({cls.code for cls in CLASSES}) == len(CLASSES)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_code_is_lower_case_words_joined_by_hyphens(cls: type[OrdersError]) -> None:
    """Codes have one spelling."""
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", cls.code)


def test_the_tree_shows_every_class_below_its_parent() -> None:
    """The documented tree equals the class hierarchy."""
    parents = {cls.__name__: cls.__bases__[0].__name__ for cls in CLASSES if cls is not OrdersError}
    assert {name: parent for name, (parent, _) in drawing().items() if parent} == parents


@pytest.mark.parametrize(
    "cls", [cls for cls in CLASSES if issubclass(cls, RequestError | Unavailable) and not cls.__subclasses__()]
)
def test_the_tree_shows_the_codes_that_callers_see(cls: type[OrdersError]) -> None:
    """Each error that a caller may see has its code beside it."""
    _, beside = drawing()[cls.__name__]
    assert beside.split()[0] == cls.code


def test_a_validation_error_carries_its_mistakes() -> None:
    """The list of mistakes is part of the error."""
    wrong = {"pointer": "/items", "detail": "is missing"}
    assert errors.ValidationFailed("invalid", [wrong]).errors == [wrong]
