"""Head and body of a response leave together; a head whose body comes later does not wait for it."""

import asyncio

from app.api.server.http1 import WholeResponse


class Sent(asyncio.Transport):
    """A transport that keeps what is written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.writes.append(bytes(data))

    def close(self) -> None:
        self.writes.append(b"closed")


def response() -> tuple[WholeResponse, list[bytes]]:
    sent = Sent()
    return WholeResponse(sent, asyncio.get_running_loop()), sent.writes


async def test_head_and_body_of_one_turn_are_one_write() -> None:
    """Later parts are written as they come."""
    transport, writes = response()
    for part in (b"head ", b"body", b"more", b"still more"):
        transport.write(part)
    assert writes == [b"head body", b"more", b"still more"]


async def test_a_head_alone_leaves_in_the_next_turn() -> None:
    """As that of a stream of events, whose first event may come much later."""
    transport, writes = response()
    transport.write(b"head")
    assert writes == []
    await asyncio.sleep(0)
    assert writes == [b"head"]
    transport.write(b"body")
    assert writes == [b"head", b"body"]


async def test_a_response_without_a_body_leaves_at_its_end() -> None:
    """At the end of the response, or before the connection is closed."""
    transport, writes = response()
    transport.write(b"head")
    transport.flush()
    transport.flush()
    assert writes == [b"head"]
    closing, writes = response()
    closing.write(b"head")
    closing.close()
    assert writes == [b"head", b"closed"]
