"""The port to a protocol: cut each direction's stream so that every frame that a fault may choose is one piece.

A module implements a protocol (`Proxy(host, port, frames=postgres)`): it has the functions of `Frames`, and exports the
names of its frames as constants.
"""

from collections.abc import Iterable
from typing import NamedTuple, Protocol


class Piece(NamedTuple):
    """A part of a stream: `data` to forward, `reply` to send back on behalf of the other end.

    With `frame`, the piece is exactly one whole frame (or message) of this name; else it is any run of bytes.
    `blocked` and `unblocked` are the server's notices to a sender that it must wait, and that it may continue.
    """

    data: bytes
    frame: str = ""
    reply: bytes = b""
    blocked: bytes = b""
    unblocked: bytes = b""


class Watcher(Protocol):
    """Watches one direction of one connection."""

    def feed(self, chunk: bytes) -> Iterable[Piece]:
        """Take the next chunk of the stream; return the pieces that can be forwarded now.

        A chunk may hold many frames, or part of one. A frame with a name is returned only when it is whole. Raises
        ValueError when the stream is not of this protocol.
        """
        ...

    def doubled(self, piece: Piece) -> None:  # noqa: ARG002 - in some protocols it makes no difference
        """Note that the sender of this stream received a piece twice, so it may answer twice."""
        return


class Frames(Protocol):
    """The functions of a protocol's module."""

    def requests(self) -> Watcher:
        """Return a watcher for the stream from one client."""
        ...

    def answers(self) -> Watcher:
        """Return a watcher for the stream from the server on one connection."""
        ...
