"""The partners of every contender: `python -m bench.partners`. Constant answers, in the format of the sandbox.

The sandbox decides and stores each call, which takes longer than the service's own work, so it would be what is
measured. This answers in about 20 µs of a core. For each shipment it sends one byte to each client of FINISHED_PORT,
with which the load generator keeps the number of unfinished orders constant.
"""

import asyncio
import os

import uvloop

HEAD_END = b"\r\n\r\n"
LENGTH = b"content-length:"
SHIPMENTS = b"POST /v1/shipments "
ANSWERS = {
    b"POST /v1/inventory/hold ": (201, b'{"reservation_id":"res_1","expires_at":"2100-01-01T00:00:00.000000Z"}'),
    b"POST /v1/payments/charge ": (201, b'{"payment_id":"pay_1"}'),
    b"POST /v1/inventory/commit ": (200, b'{"saga_id":"1","state":"committed"}'),
    SHIPMENTS: (201, b'{"tracking_id":"trk_1"}'),
    b"POST /v1/traces ": (200, b""),  # a collector of traces, for the shape that exports them
}
HEAD = b"HTTP/1.1 %d OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
RESPONSES = {line: HEAD % (status, len(body)) + body for line, (status, body) in ANSWERS.items()}
NOT_FOUND = HEAD % (404, 2) + b"{}"  # for the janitor, which looks for a ledger

listeners: set[asyncio.StreamWriter] = set()


class Partner(asyncio.Protocol):
    """One connection of a contender."""

    def __init__(self) -> None:
        self._buffer = b""
        self._transport: asyncio.BaseTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer each complete request."""
        self._buffer += data
        while (end := self._buffer.find(HEAD_END)) >= 0:
            head = self._buffer[:end].lower()
            at = head.find(LENGTH)
            length = int(head[at + len(LENGTH) :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self._buffer) < end + len(HEAD_END) + length:
                return
            line = self._buffer[: self._buffer.index(b"HTTP/1.1")]
            self._buffer = self._buffer[end + len(HEAD_END) + length :]
            self._transport.write(RESPONSES.get(line, NOT_FOUND))  # type: ignore[union-attr] # connected, and of TCP
            if line == SHIPMENTS:
                for listener in listeners:
                    listener.write(b".")


async def report_shipments(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send a byte for each shipment until the listener closes the connection."""
    listeners.add(writer)
    try:
        await reader.read()
    except ConnectionResetError:  # it closed with unread reports
        pass
    finally:
        listeners.discard(writer)
        writer.close()


async def main() -> None:
    """Serve until killed."""
    await asyncio.start_server(report_shipments, "127.0.0.1", int(os.environ["FINISHED_PORT"]))
    server = await asyncio.get_running_loop().create_server(Partner, "127.0.0.1", int(os.environ["PORT"]))
    await server.serve_forever()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
