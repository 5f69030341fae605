"""The hooks of the crash-point sweep: which calls are points, and how they are named."""

from pathlib import Path
from types import ModuleType

import pytest

from chaos.sweep.hooks import Hooks

SOURCE = """
async def call(library):
    return await library.send()
"""


class Library:
    """A library that does I/O."""

    async def send(self) -> str:
        """Answer."""
        return "answer"


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the points are recorded; the hooks are not armed yet."""
    monkeypatch.setenv("SWEEP_ARMED", str(tmp_path / "armed"))
    monkeypatch.setenv("SWEEP_RECORD", str(tmp_path / "points"))
    return tmp_path / "points"


async def test_what_the_janitor_calls_is_no_point_of_an_order(record: Path, tmp_path: Path) -> None:
    """A loop that works meanwhile adds no points to those of an order, wherever the call itself is made."""
    (tmp_path / "armed").touch()
    janitor, inbox = ModuleType("app.operations.maintenance.pruner"), ModuleType("app.messaging.inbox")
    for module in (janitor, inbox):
        exec(SOURCE.replace("library.send", "library.call" if module is janitor else "library.send"), module.__dict__)  # noqa: S102 - as above
    inbox_of = type("Inbox", (), {"call": staticmethod(lambda: inbox.call(library_class()()))})
    assert await janitor.call(inbox_of) == "answer"
    assert recorded(record) == []


async def call_from(module: str) -> str:
    """Call the library from a module of this name."""
    caller = ModuleType(module)
    exec(SOURCE, caller.__dict__)  # noqa: S102 - a module with a name of our own
    answer: str = await caller.call(library_class()())
    return answer


def recorded(record: Path) -> list[str]:
    """Return the points so far."""
    return record.read_text().splitlines() if record.exists() else []


def library_class() -> type[Library]:
    """Return a class that is hooked."""
    kind = type("Hooked", (Library,), {})
    Hooks().install(kind, "send", "library")
    return kind


async def test_a_call_has_a_point_before_and_one_after(record: Path, tmp_path: Path) -> None:
    """The points are named by library and place, and counted from when the hooks are armed."""
    assert await call_from("app.orders.store") == "answer"
    assert recorded(record) == []
    (tmp_path / "armed").touch()
    assert await call_from("app.orders.store") == "answer"
    assert recorded(record) == [
        "library app.orders.store:call 1 before",
        "library app.orders.store:call 1 after",
    ]


@pytest.mark.parametrize(
    ("within", "module", "is_point"),
    [
        (None, "app.orders.store", True),
        (None, "app.operations.maintenance.pruner", False),
        (None, "other.orders", False),
        ("app.operations.maintenance", "app.operations.maintenance.pruner", True),
        ("app.operations.maintenance", "app.orders.store", False),
        ("", "app.operations.maintenance.pruner", True),
        ("", "other.orders", False),
    ],
)
async def test_only_the_calls_of_one_part_are_points(
    within: str | None, module: str, is_point: bool, record: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default the loops that work without an order are left out; SWEEP_WITHIN chooses a part of the service."""
    if within is not None:
        monkeypatch.setenv("SWEEP_WITHIN", within)
    (tmp_path / "armed").touch()
    await call_from(module)
    assert bool(recorded(record)) is is_point
