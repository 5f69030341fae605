"""A cursor is a position and nothing else: it round-trips, and other text is refused."""

import re
from datetime import UTC, datetime
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api.orders.cursors import PATTERN, read_cursor, write_cursor
from app.orders.queries import Position

POSITIONS = st.builds(
    Position,
    st.datetimes(datetime(1970, 1, 1), datetime(4253, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001 - hypothesis wants them naive
    st.uuids(),
)
POSITION = Position(datetime(2026, 11, 21, 3, 47, 27, 123456, UTC), UUID("01890a5d-ac96-774b-bcce-b302099a8057"))


@given(POSITIONS)
def test_a_position_round_trips(position: Position) -> None:
    """Reading a written cursor returns the position."""
    cursor = write_cursor(position)
    assert read_cursor(cursor) == position
    assert re.fullmatch(r"[A-Za-z0-9_-]{32}", cursor)


@given(st.from_regex(PATTERN, fullmatch=True))
def test_every_matching_text_is_one_position(text: str) -> None:
    """Each text that matches the documented pattern is the cursor of one position."""
    assert write_cursor(read_cursor(text)) == text


@given(POSITIONS, POSITIONS)
def test_no_two_positions_share_a_cursor(one: Position, other: Position) -> None:
    """Different positions have different cursors."""
    assert (write_cursor(one) == write_cursor(other)) == (one == other)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "A" * 32,
        "AQ" + "A" * 29,
        "AQ" + "A" * 31,
        "AQ" + "A" * 29 + "=",
        "AQ" + "A" * 29 + "+",
        "AQ" + "A" * 30 + "\n",
        "AQ" + "A" * 29 + "é",
        "AQ" + "A" * 29 + "٥",
        '{"placed_at": 1}',
        str(POSITION.id),
    ],
)
def test_other_text_is_refused(text: str) -> None:
    """Text of another form is a ValueError."""
    with pytest.raises(ValueError, match="is not a cursor"):
        read_cursor(text)


@given(st.text())
def test_any_text_is_a_cursor_or_refused(text: str) -> None:
    """No text raises any other error."""
    try:
        read_cursor(text)
    except ValueError:
        assert not re.fullmatch(PATTERN.strip("^$"), text)
