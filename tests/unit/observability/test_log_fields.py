"""The fields that log lines have: bound to a task or a block, and never to another."""

import asyncio

import pytest

from app.observability import log_fields


def test_a_block_has_its_fields_and_those_around_it() -> None:
    """Inside a block its fields are added; what is bound inside ends with it."""
    with log_fields.bound(tenant="acme"):
        with log_fields.bound(order_id="1", tenant="globex"):
            log_fields.bind(event_id="2")
            assert log_fields.current() == {"tenant": "globex", "order_id": "1", "event_id": "2"}
        assert log_fields.current() == {"tenant": "acme"}


def test_a_block_ends_with_an_exception_too() -> None:
    """An exception takes the fields of the block with it."""
    with pytest.raises(ValueError, match="out"), log_fields.bound(tenant="acme"):
        raise ValueError("out")
    assert log_fields.current() == {}


async def test_tasks_do_not_share_fields() -> None:
    """A task begins with the fields of the one that started it, and its own reach no other."""

    async def work(name: str) -> dict[str, str]:
        log_fields.bind(order_id=name)
        await asyncio.sleep(0)
        return dict(log_fields.current())

    with log_fields.bound(tenant="acme"):
        found = await asyncio.gather(work("1"), work("2"))
        assert list(found) == [{"tenant": "acme", "order_id": "1"}, {"tenant": "acme", "order_id": "2"}]
        assert log_fields.current() == {"tenant": "acme"}
