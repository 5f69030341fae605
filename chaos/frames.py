"""What the proxy asks of a protocol: cut each direction's stream so that a frame which a fault may name stands alone.

A module is a protocol's implementation (`Proxy(host, port, frames=postgres)`): it has the functions of `Frames`, and
exports the names of its frames as constants.
"""

from collections.abc import Iterable
from typing import NamedTuple, Protocol


class Piece(NamedTuple):
    """A part of a stream: `data` to be forwarded, `reply` to be sent back in the other end's place.

    With `frame`, the piece is exactly one whole frame (or message), and this is its name; else it is any run of bytes.
    `blocked` and `unblocked` are what the protocol lets a server say to a sender that has to wait from here on, and
    when it may go on.
    """

    data: bytes
    frame: str = ""
    reply: bytes = b""
    blocked: bytes = b""
    unblocked: bytes = b""


class Watcher(Protocol):
    """Watches one direction of one connection."""

    def feed(self, chunk: bytes) -> Iterable[Piece]:
        """Take the next bytes as they came; give back what may go on now.

        Frames may be many in a chunk, or one in many chunks. Of a frame with a name, nothing goes on before it is
        whole. Raises ValueError when the stream is not of this protocol.
        """
        ...

    def doubled(self, piece: Piece) -> None:  # noqa: ARG002 - for protocols in which it makes no difference
        """Note that whoever sends this stream was given a piece of the other one twice, so it may answer twice."""
        return


class Frames(Protocol):
    """What a protocol's module has."""

    def requests(self) -> Watcher:
        """Return a watcher for what one client sends."""
        ...

    def answers(self) -> Watcher:
        """Return a watcher for what the server sends on one connection."""
        ...
