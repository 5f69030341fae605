"""HTTP as a client may send it that does not care how it should: bytes over a socket."""

import asyncio
import contextlib
import re
import socket
from collections.abc import AsyncIterator

import httpx

LARGE = 64 * 1024


@contextlib.asynccontextmanager
async def dialled(
    api: httpx.AsyncClient, first: bytes = b""
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Connect. What is said `first` is there when the server, on this thread too, begins to count the time."""
    client = socket.create_connection(("127.0.0.1", api.base_url.port))
    client.sendall(first)
    reader, writer = await asyncio.open_connection(sock=client)
    try:
        yield reader, writer
    finally:
        writer.close()


async def heard(reader: asyncio.StreamReader) -> bytes:
    """Return all that comes. After an answer a reset ends it too: for one who still sends, when the server lingered."""
    answer = b""
    try:
        while piece := await reader.read(LARGE):
            answer += piece
    except ConnectionError:
        if not answer:
            raise
    return answer


def statuses(answers: bytes) -> list[int]:
    """Return the status of each answer."""
    return [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3}) ", answers)]
