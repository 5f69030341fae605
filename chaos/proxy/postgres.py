"""PostgreSQL's frames, protocol 3.0: find the client's COMMIT and the server's answer to it.

A client's COMMIT is the simple Query `COMMIT;` (which asyncpg's transactions send), a Query of several statements that
ends in one, or the Bind of a statement that was prepared as one. The server's answer is the CommandComplete with the
tag COMMIT, sent only once the transaction is durable. If COMMIT fails, or its transaction was aborted, the answer is an
ErrorResponse or the tag ROLLBACK. A statement outside BEGIN … COMMIT commits without either frame.

The proxy declines encryption on behalf of the server; otherwise it could not read the frames.
Source: PostgreSQL's manual, "Message Formats"; `exec_simple_query` and `exec_execute_message` in postgres.c, which
finish the transaction before they complete the command.
"""

import struct
from collections.abc import Callable, Iterator

from chaos.proxy.frames import Piece, Watcher

COMMIT_REQUEST = "postgres: COMMIT request"
COMMIT_ANSWER = "postgres: COMMIT answer"

HEADER = struct.Struct("!xi")  # type; length, which counts itself but not the type
STARTUP = struct.Struct("!ii")  # length, which counts itself; protocol version or code of the request
ENCRYPTION_REQUESTS = frozenset({80877103, 80877104})  # SSLRequest, GSSENCRequest
ENCRYPTION_DECLINED = b"N"
STARTUP_BYTES = 10_000  # the server's own limit, MAX_STARTUP_PACKET_LENGTH
# Longer frames are forwarded unread: a COMMIT is short; only a batch of statements in one Query could be longer.
READ_BYTES = 64 * 1024


def requests() -> Watcher:
    """Return a watcher for the stream from one client."""
    return _Requests()


def answers() -> Watcher:
    """Return a watcher for the stream from the server on one connection."""
    return _Typed(b"C", _name_of_answer)


class _Typed(Watcher):
    """Cuts a stream of typed frames. Frames of the `read` types are held until they are whole, then named."""

    def __init__(self, read: bytes, name: Callable[[bytes], str]) -> None:
        self._read = read
        self._name = name
        self._held = b""  # the start of a frame: an incomplete header, or a frame to read
        self._passing = 0  # remaining bytes of a frame that is forwarded unread

    def feed(self, chunk: bytes) -> Iterator[Piece]:
        data = self._held + chunk if self._held else chunk
        start = 0  # of the bytes that are not yet returned
        position = min(self._passing, len(data))
        self._passing -= position
        while len(data) - position >= HEADER.size:
            end = position + _frame_bytes(data, position)
            if data[position] in self._read and end - position <= READ_BYTES:
                if end > len(data):
                    break
                if name := self._name(data[position:end]):
                    if start < position:
                        yield Piece(data[start:position])
                    yield Piece(data[position:end], name)
                    start = end
            position = min(end, len(data))
            self._passing = end - position
        self._held = data[position:]
        if start < position:
            yield Piece(data[start:position])


def _frame_bytes(data: bytes, position: int) -> int:
    (length,) = HEADER.unpack_from(data, position)
    if length < HEADER.size - 1:
        raise ValueError(f"not a PostgreSQL frame: {data[position : position + HEADER.size]!r}")
    return int(length) + 1


def _name_of_answer(frame: bytes) -> str:
    return COMMIT_ANSWER if frame[HEADER.size :] == b"COMMIT\0" else ""


class _Requests(Watcher):
    """The stream from a client: requests for encryption, the startup message (or a cancel request), typed frames."""

    def __init__(self) -> None:
        self._starting: bytes | None = b""  # the start of an untyped message; None: only typed frames follow
        self._typed = _Typed(b"QPB", self._name)
        self._commits: set[bytes] = set()  # names of prepared statements that are a COMMIT

    def feed(self, chunk: bytes) -> Iterator[Piece]:
        if self._starting is None:
            yield from self._typed.feed(chunk)
            return
        data = self._starting + chunk
        while len(data) >= STARTUP.size:
            length, code = STARTUP.unpack_from(data)
            if not STARTUP.size <= length <= STARTUP_BYTES:
                raise ValueError(f"not a PostgreSQL startup message: {data[: STARTUP.size]!r}")
            if len(data) < length:
                break
            message, data = data[:length], data[length:]
            if code not in ENCRYPTION_REQUESTS:
                self._starting = None
                yield Piece(message)
                yield from self._typed.feed(data)
                return
            yield Piece(b"", reply=ENCRYPTION_DECLINED)
        self._starting = data

    def _name(self, frame: bytes) -> str:
        kind, body = frame[:1], frame[HEADER.size :]
        if kind == b"Q":
            return COMMIT_REQUEST if _ends_in_commit(body) else ""
        name, rest = body.split(b"\0", 1)
        if kind == b"P":  # Parse: statement, query, types of parameters
            self._prepared(name, rest.split(b"\0", 1)[0])
            return ""
        return COMMIT_REQUEST if rest.split(b"\0", 1)[0] in self._commits else ""  # Bind: portal, statement, values

    def _prepared(self, name: bytes, query: bytes) -> None:
        """Record whether a prepared statement is a COMMIT. Its name, above all the empty one, may be reused."""
        if _ends_in_commit(query):
            self._commits.add(name)
        else:
            self._commits.discard(name)


def _ends_in_commit(query: bytes) -> bool:
    return query.rstrip(b"; \t\r\n\0").rpartition(b";")[2].strip().upper() == b"COMMIT"
