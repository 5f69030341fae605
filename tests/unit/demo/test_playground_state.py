"""What the playground shows of rules that meet, and of a part that cannot be read."""

from collections.abc import Iterator

from app.demo.playground.state import Source, name_faults


def test_no_limit_outweighs_a_limit() -> None:
    """A fault is shown as limited only if each of its rules is."""
    rule = {"target": "payment.charge", "kind": "refuse"}
    for times, remaining in (((1, 2), 3), ((1, None), None), ((None, 1), None)):
        (fault,) = name_faults([{**rule, "times": number} for number in times])
        assert fault.remaining == remaining


async def test_an_unexpected_error_stops_one_part_only() -> None:
    """A part whose reading fails keeps what it had, and says that this is not current."""
    answers: Iterator[str] = iter(["1", "no number"])

    async def read() -> int:
        return int(next(answers))

    source = Source(read)
    await source.refresh()
    assert (source.value, source.problem) == (1, "")
    await source.refresh()
    assert source.value == 1
    assert "could not be read" in source.problem
