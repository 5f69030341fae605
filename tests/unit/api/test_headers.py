"""`If-None-Match` and `Prefer` are parsed as their RFCs say, and malformed values are ignored."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api.orders.headers import none_match_fails, preferred_wait

OURS = '"1-2"'
OPAQUE = st.text(st.characters(min_codepoint=0x23, max_codepoint=0x7E), max_size=8).map(lambda text: f'"{text}"')
TAGS = st.tuples(st.sampled_from(["", "W/"]), OPAQUE).map("".join)
SEPARATORS = st.sampled_from([",", ", ", " ,\t", ",,", ", , "])


@pytest.mark.parametrize(
    "values",
    [
        ['"1-2"'],
        ['W/"1-2"'],
        ["*"],
        [" * "],
        ['"a", "1-2"'],
        ['"a,b" , W/"1-2",'],
        [', "1-2"'],
        ['"a"', '"1-2"'],
        ['"",\t"1-2"'],
    ],
)
def test_a_named_etag_fails_the_condition(values: list[str]) -> None:
    """The answer would be a 304."""
    assert none_match_fails(values, OURS)


@pytest.mark.parametrize(
    "values",
    [
        [],
        [""],
        [","],
        ['"1-3"'],
        ["1-2"],
        ['"1-2'],
        ['w/"1-2"'],
        ['"x"1-2""'],
        ['*, "1-2"'],
        ['"a" "1-2"'],
        ['"a 1-2"'],
        ['"*"'],
        ['", "1-2", "'],
    ],
)
def test_other_values_are_no_condition(values: list[str]) -> None:
    """Another ETag, or a malformed list, is ignored."""
    assert not none_match_fails(values, OURS)


@given(st.lists(TAGS, min_size=1, max_size=5), SEPARATORS, TAGS)
def test_any_list_is_searched_by_weak_comparison(tags: list[str], separator: str, ours: str) -> None:
    """The ETag is found in any valid list of ETags."""
    ours = ours.removeprefix("W/")
    assert none_match_fails([separator.join(tags)], ours) == (ours in {tag.removeprefix("W/") for tag in tags})


@pytest.mark.parametrize(
    ("values", "seconds"),
    [
        (["wait=5"], 5),
        (["WAIT = 0"], 0),
        (["respond-async, wait=10"], 10),
        (["respond-async", "wait=10"], 10),
        (['foo="a, wait=1"; bar, wait=2'], 2),
        (['foo="a\\", wait=1", wait=2'], 2),
        (["wait=3; foo=bar"], 3),
        (["foo; wait=1, wait=4"], 4),
        (["wait=5, wait=6"], 5),
        (["wait=x, wait=6"], None),
        (["wait=00000000000000000007"], 7),
        (["wait=99999999999999999999"], 99999999999999999999),
        (["wait"], None),
        (["wait="], None),
        (["wait=-1"], None),
        (["wait=1.5"], None),
        (['wait="5"'], None),
        (["wait=5 s"], None),
        (["wait=٥"], None),
        (["=5"], None),
        (["waiting=5"], None),
        ([""], None),
        ([], None),
    ],
)
def test_the_first_wait_among_the_preferences_counts(values: list[str], seconds: int | None) -> None:
    """Later values and other preferences are ignored."""
    assert preferred_wait(values) == seconds


@given(st.integers(0, 10**9), st.sampled_from(["", "return=minimal, ", 'a="b,c";d=e , ']), st.sampled_from(["", ", x"]))
def test_a_wait_is_found_at_any_position(seconds: int, before: str, after: str) -> None:
    """The wait is found among any other preferences."""
    assert preferred_wait([f"{before}wait={seconds}{after}"]) == seconds


@given(st.lists(st.text(st.characters(max_codepoint=0xFF)), max_size=3))
def test_no_value_is_an_error(values: list[str]) -> None:
    """No header value raises an error."""
    none_match_fails(values, OURS)
    preferred_wait(values)


@pytest.mark.parametrize("value", ['"\\' * 8000, '"' * 16001, "a=" * 8000, " ," * 8000, '"a",' * 4000, ";" * 16000])
def test_the_longest_header_is_parsed_quickly(value: str) -> None:
    """Quadratic parsing would take 100 million steps, and exceed the time limit of the suite."""
    for _ in range(100):
        none_match_fails([value], OURS)
        preferred_wait([value])
