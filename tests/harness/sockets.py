"""Send bytes to the service over a socket, and check the responses."""

import asyncio
import contextlib
import json
import re
import socket
from collections.abc import AsyncIterator

import httpx

from tests.harness.wait import AMPLE_SECONDS

LARGE = 64 * 1024


@contextlib.asynccontextmanager
async def dialled(
    api: httpx.AsyncClient, first: bytes = b"", *, peer: str = "127.0.0.1"
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Connect from the address `peer`, and send `first`.

    `first` has arrived before the server, which runs in this thread too, starts its timers.
    """
    client = socket.create_connection(("127.0.0.1", api.base_url.port), source_address=(peer, 0))
    client.sendall(first)
    reader, writer = await asyncio.open_connection(sock=client)
    try:
        yield reader, writer
    finally:
        writer.close()


async def said(api: httpx.AsyncClient, *parts: bytes, first: bytes = b"") -> bytes:
    """Send these bytes, and return everything received until the server closes."""
    async with dialled(api, first) as (reader, writer), asyncio.timeout(AMPLE_SECONDS):
        hearing = asyncio.create_task(heard(reader))
        for part in parts:
            writer.write(part)
            with contextlib.suppress(ConnectionError):
                await writer.drain()
        return await hearing


async def heard(reader: asyncio.StreamReader) -> bytes:
    """Return everything received. A reset after a response counts as the end, as the test may still be sending."""
    answer = b""
    try:
        while piece := await reader.read(LARGE):
            answer += piece
    except ConnectionError:
        if not answer:
            raise
    return answer


def statuses(answers: bytes) -> list[int]:
    """Return the status of each response, in order."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answers)]


def problem(answer: bytes, status: int, code: str) -> dict[str, str]:
    """Assert that the response is one problem with all its headers; return the headers."""
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    assert first.startswith(f"HTTP/1.1 {status} ")
    assert (headers["content-type"], headers["connection"]) == ("application/problem+json", "close")
    assert headers["x-request-id"]
    assert headers["x-content-type-options"] == "nosniff"
    assert "server" not in headers
    problem = json.loads(body)
    assert (problem["status"], problem["code"]) == (status, code)
    assert len(body) == int(headers["content-length"])
    return headers


def get(target: bytes = b"/livez", *headers: bytes) -> bytes:
    return b"GET " + target + b" HTTP/1.1\r\n" + b"".join(line + b"\r\n" for line in (b"Host: x", *headers)) + b"\r\n"
