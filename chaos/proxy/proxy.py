"""A TCP proxy that forwards unchanged unless a fault is armed.

    async with Proxy("127.0.0.1", 5432, frames=postgres) as proxy:
        pool = await create_pool(proxy.url(database_url), 10)
        lost = Lose(postgres.COMMIT_ANSWER, probability=0.05)
        proxy.arm(lost)
        ...
        proxy.disarm()
        assert proxy.struck[lost]

Effect of a lost COMMIT: if the request was lost, it was never forwarded, so the server sees the connection end with the
transaction open, and rolls it back. If the answer was lost, the server sent it whole, so the transaction is durable.

If the upstream is down, the proxy accepts a connection and closes it. The same `dice` and the same traffic in the same
order give the same strikes.
"""

import asyncio
import random
import socket
from collections import Counter
from typing import Self
from urllib.parse import urlsplit

from chaos.proxy.connection import RST_ON_CLOSE, Connection
from chaos.proxy.faults import Armed, Blackhole, Block, Fault, Overtake, Refuse, Reset
from chaos.proxy.frames import Frames

HOST = "127.0.0.1"
BACKLOG = 512


class Proxy:
    """Listens on a free port of 127.0.0.1 while entered, and forwards to `upstream_host`:`upstream_port`.

    Call all methods from the event loop's thread. They take effect before they return.
    """

    def __init__(
        self, upstream_host: str, upstream_port: int, *, frames: Frames, dice: random.Random | None = None
    ) -> None:
        self._upstream = (upstream_host, upstream_port)
        self._frames = frames
        self._armed = Armed(dice or random.Random())  # noqa: S311 - no secret, and tests give their own
        self._connections: dict[asyncio.Task[None], Connection] = {}
        self._reservation: socket.socket | None = None
        self._listener: socket.socket | None = None

    async def __aenter__(self) -> Self:
        self._reservation = _bound(0)
        self._listen()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop_listening()
        if self._reservation:
            self._reservation.close()
        self.cut()
        await asyncio.gather(*self._connections, return_exceptions=True)

    @property
    def port(self) -> int:
        """The port to connect to. It never changes, even while connections are refused."""
        if self._reservation is None:
            raise RuntimeError("bug: the proxy was not entered")
        return int(self._reservation.getsockname()[1])

    def url(self, of: str) -> str:
        """Return the upstream's URL with the proxy's address."""
        parts = urlsplit(of)
        user, at, _ = parts.netloc.rpartition("@")
        return parts._replace(netloc=f"{user}{at}{HOST}:{self.port}").geturl()

    @property
    def struck(self) -> Counter[Fault]:
        """How often each fault struck, including disarmed ones."""
        return self._armed.struck

    def arm(self, fault: Fault) -> None:
        """Let a fault strike from now on, in addition to those already armed."""
        self._armed.arm(fault)
        match fault:
            case Reset():
                for task, connection in self._connections.items():
                    if self._armed.strike(fault):
                        connection.close(reset=True)
                        task.cancel()
            case Blackhole():
                for connection in self._connections.values():
                    if self._armed.strike(fault):
                        connection.hold()
            case Refuse() if self._armed.strike(fault):
                self._stop_listening()

    def disarm(self, fault: Fault | None = None) -> None:
        """Stop a fault, or all faults, and deliver the data that they held back."""
        self._armed.disarm(fault)
        for kind in (Blackhole, Block, Overtake):
            if not self._armed.has(kind):
                for connection in self._connections.values():
                    connection.release(kind)
        if not self._armed.has(Refuse):
            self._listen()

    def redirect(self, upstream_host: str, upstream_port: int) -> None:
        """Forward new connections to another server. Open connections stay."""
        self._upstream = (upstream_host, upstream_port)

    def cut(self) -> None:
        """Close every connection at once, and deliver nothing more."""
        for task, connection in self._connections.items():
            connection.close(at_once=True)
            task.cancel()  # it may not be connected yet

    def _listen(self) -> None:
        if self._listener is None:
            self._listener = _bound(self.port)
            self._listener.listen(BACKLOG)
            asyncio.get_running_loop().add_reader(self._listener, self._accept, self._listener)

    def _stop_listening(self) -> None:
        listener, self._listener = self._listener, None
        if listener:
            asyncio.get_running_loop().remove_reader(listener)
            listener.close()

    def _accept(self, listener: socket.socket) -> None:
        try:
            client, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return  # the client has left
        client.settimeout(0)
        if self._armed.strike_any(Reset):
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST_ON_CLOSE)
            client.close()
            return
        connection = Connection(self._armed, self._frames)
        task = asyncio.get_running_loop().create_task(connection.run(client, self._upstream))
        self._connections[task] = connection
        task.add_done_callback(self._connections.pop)
        task.add_done_callback(lambda _: client.close())  # its transport closed it, unless none was made


def _bound(port: int) -> socket.socket:
    """Return a socket that is bound to the port, alone or together with the proxy's other one.

    While neither listens, connections are refused, and no other process gets the port.
    """
    bound = socket.socket()
    bound.settimeout(0)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # connections inherit it: forward without delay
    bound.bind((HOST, port))
    return bound
