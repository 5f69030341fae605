"""One forwarded connection with two ends, the client's socket and the upstream's. Each end's input goes to the other.

The protocol's watcher cuts the input into pieces, and a fault may strike each of them. The rest is written to the other
end: at once if possible, without a task or a copy per chunk; else through the queue of that end, where it waits until
it is due. Each end has one queue, so the order is kept; the end of the connection waits in it like a chunk.

When one end closes, both directions close. Half-closed connections, which PostgreSQL does not use, are not supported.
"""

import asyncio
import contextlib
import socket
import struct
from collections import deque
from typing import cast

from chaos.proxy.faults import Armed, Blackhole, Block, Direction, Double, Eat, Fault, FrameFault, Lose, Overtake
from chaos.proxy.frames import Frames, Piece, Watcher

QUEUED_BYTES = 1024 * 1024  # with more than this in the queue, the proxy stops reading from the sender
RST_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER on, 0 s
CLOSE = b""  # in a queue: close after everything before it was written


class End(asyncio.Protocol):
    """One of a connection's two sockets, with the queue of data for it."""

    def __init__(self, connection: "Connection", watcher: Watcher, direction: Direction) -> None:
        self.watcher = watcher
        self.direction = direction  # of the data that it receives
        self.held: set[type[Fault]] = set()  # the faults that hold it; while there are any, nothing is written
        self.overtaken: dict[str, bytes] = {}  # frames to write after the next frame of the same name
        self.transport: asyncio.Transport | None = None
        self.closed = asyncio.Event()
        self._connection = connection
        self._queue: deque[tuple[float, bytes]] = deque()  # due time by the loop's clock, and data
        self._queued_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._choked = False  # the socket's buffer is full
        self._sender_paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Write the data that arrived before the socket was connected."""
        self.transport = cast("asyncio.Transport", transport)
        self.flush()

    def data_received(self, data: bytes) -> None:
        """Forward the data that this socket received."""
        self._connection.received(self, data)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the reason makes no difference
        """Close the other end after the data for it."""
        self._queue.clear()
        self._queued_bytes = 0
        self.flush()
        self.closed.set()
        self._connection.lost(self)

    def pause_writing(self) -> None:
        """Stop reading from the sender."""
        self._choked = True
        self._adjust_sender()

    def resume_writing(self) -> None:
        """Read from the sender again."""
        self._choked = False
        self._adjust_sender()

    def send(self, data: bytes, delay: float = 0.0) -> None:
        """Write to this socket after `delay` seconds, and after everything that is already queued."""
        if self.transport and self.transport.is_closing():
            return
        if self.transport and data and not (delay or self._queue or self.held):
            self.transport.write(data)
            return
        self._queue.append((asyncio.get_running_loop().time() + delay, data))
        self._queued_bytes += len(data)
        self.flush()

    def flush(self) -> None:
        """Write the data that is due."""
        loop = asyncio.get_running_loop()
        if self._timer:
            self._timer.cancel()
            self._timer = None
        while self._queue and self.transport and not (self.held or self.transport.is_closing()):
            due, data = self._queue[0]
            if due > loop.time():
                self._timer = loop.call_at(due, self.flush)
                break
            self._queue.popleft()
            self._queued_bytes -= len(data)
            if data == CLOSE:
                self.transport.close()
            else:
                self.transport.write(data)
        self._adjust_sender()

    def close(self, *, at_once: bool = False, reset: bool = False) -> None:
        """Close the socket: after the data already written, or at once, with a FIN or an RST."""
        if self.transport is None:
            return
        if reset and not self.transport.is_closing():
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST_ON_CLOSE)
        if at_once or reset:
            self.transport.abort()
        else:
            self.transport.close()

    def _adjust_sender(self) -> None:
        sender = self._connection.other(self).transport
        full = self._choked or self._queued_bytes > QUEUED_BYTES
        if sender and full != self._sender_paused:
            self._sender_paused = full
            if full:
                sender.pause_reading()
            else:
                sender.resume_reading()


class Connection:
    """A client's connection and its counterpart to the upstream."""

    def __init__(self, armed: Armed, frames: Frames) -> None:
        self._silent = False
        self._armed = armed
        self._client = End(self, frames.requests(), Direction.UP)
        self._upstream = End(self, frames.answers(), Direction.DOWN)
        self._unblocked: dict[End, bytes] = {}  # the notice for a blocked sender when it may continue
        if armed.strike_any(Blackhole):
            self.hold()

    async def run(self, client: socket.socket, upstream: tuple[str, int]) -> None:
        """Connect, and forward until both ends are closed. When cancelled, close both at once."""
        loop = asyncio.get_running_loop()
        try:
            with contextlib.suppress(OSError):  # the upstream is down
                await loop.connect_accepted_socket(lambda: self._client, client)
                await loop.create_connection(lambda: self._upstream, *upstream)
                await self._closed()
        finally:
            self.close(at_once=True)
            await self._closed()

    async def _closed(self) -> None:
        for end in (self._client, self._upstream):
            if end.transport:
                await end.closed.wait()

    def other(self, end: End) -> End:
        """Return the opposite end."""
        return self._upstream if end is self._client else self._client

    def received(self, source: End, data: bytes) -> None:
        """Forward the data that an end received, unless a fault strikes."""
        if self._silent:
            return
        target, delay = self.other(source), self._armed.delay(source.direction, len(data))
        for piece in source.watcher.feed(data):
            overtakes = piece.frame in target.overtaken
            fault = self._armed.strike_frame(piece.frame) if piece.frame and not overtakes else None
            if isinstance(fault, Lose):
                self._silent = fault.silent
                if not self._silent:
                    self.close()
                return
            self._forward(source, piece, fault, delay)
            if overtakes:
                target.send(target.overtaken.pop(piece.frame), delay)

    def _forward(self, source: End, piece: Piece, fault: FrameFault | None, delay: float) -> None:
        target = self.other(source)
        match fault:
            case Eat():
                return
            case Overtake():
                target.overtaken[piece.frame] = piece.data
                return
            case Double():
                target.send(piece.data, delay)
                target.watcher.doubled(piece)
            case Block():
                self._block(source, piece)
        if piece.data:
            target.send(piece.data, delay)
        if piece.reply:
            source.send(piece.reply, delay)

    def _block(self, sender: End, piece: Piece) -> None:
        self.other(sender).held.add(Block)
        if sender not in self._unblocked:
            self._unblocked[sender] = piece.unblocked
            if piece.blocked:
                sender.send(piece.blocked)

    def lost(self, end: End) -> None:
        """Close the other end too: after the data queued for it, or at once if the connection is silent."""
        if self._silent:
            self.close(at_once=True)
        else:
            self._send_overtaken(self.other(end))
            self.other(end).send(CLOSE)

    def close(self, *, at_once: bool = False, reset: bool = False) -> None:
        """Close both ends (see `End.close`), and discard their queues."""
        self._client.close(at_once=at_once, reset=reset)
        self._upstream.close(at_once=at_once, reset=reset)

    def hold(self) -> None:
        """Deliver nothing from now on."""
        self._client.held.add(Blackhole)
        self._upstream.held.add(Blackhole)

    def release(self, kind: type[Fault]) -> None:
        """Deliver the data that faults of this kind held back."""
        for end in (self._client, self._upstream):
            if kind is Overtake:
                self._send_overtaken(end)
            if kind is Block and (notice := self._unblocked.pop(end, b"")):
                end.send(notice)
            end.held.discard(kind)
            end.flush()

    def _send_overtaken(self, end: End) -> None:
        while end.overtaken:
            end.send(end.overtaken.popitem()[1])
