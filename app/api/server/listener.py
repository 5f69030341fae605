"""Runs ASGI applications until SIGINT or SIGTERM, then lets them finish; shared by every command that serves."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import uvicorn

from app.errors import ConfigurationError

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Longer than clients and proxies commonly keep a connection that idles (60 s): so they close it, and no request crosses
# our close on its way, which its sender could not tell from one that was lost.
KEEP_ALIVE_SECONDS = 75


class Server(uvicorn.Server):
    """uvicorn on a socket of ours, without its signal handling.

    uvicorn raises the signal again when it is done, which would end the process by the signal instead of with exit
    code 0; and two servers in one process would overwrite each other's handlers.
    """

    def __init__(
        self,
        app: Any,
        listener: socket.socket,
        shutdown_seconds: float,
        http: Any = "auto",
        keep_alive_seconds: int = KEEP_ALIVE_SECONDS,
        stopping: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=http,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                # The end of one answer starts the next request of its connection, which must not inherit its trace.
                reset_contextvars=True,
                timeout_keep_alive=keep_alive_seconds,
                # Half of the time for open requests, the rest for the roles, which stop after them.
                timeout_graceful_shutdown=max(1, int(shutdown_seconds / 2)),
            )
        )
        self.listener = listener
        self._stopping = stopping

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Call `stopping` before waiting for open requests, so that those which wait for an order are answered."""
        self._stopping()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to `run`."""
        yield


def listen(host: str, port: int) -> socket.socket:
    """Bind before anything else starts, so that a taken port is one clear line. Raises ConfigurationError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = host == "::" and socket.has_dualstack_ipv6()
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048, dualstack_ipv6=both)
    except OSError as error:
        raise ConfigurationError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    # Every connection inherits it. Else an answer's body waits for the client to acknowledge its head: 40 ms each time.
    # uvloop would see to it for itself, but asyncio does so only for sockets whose protocol was named.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


async def until_signalled(work: Coroutine[Any, Any, None]) -> None:
    """Run `work` to its end, or until SIGINT or SIGTERM cancels it: then it cleans up, and all is well.

    The whole of a command belongs inside, its start too, so that a signal at any instant is an orderly end.
    """
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(work)
    signalled = asyncio.Event()

    def stop() -> None:
        if not signalled.is_set():  # once: another signal must not interrupt the cleaning up
            signalled.set()
            task.cancel()

    for number in SIGNALS:
        loop.add_signal_handler(number, stop)
    try:
        await task
    except asyncio.CancelledError:
        if not signalled.is_set():
            raise
    finally:
        for number in SIGNALS:
            loop.remove_signal_handler(number)


async def run(
    *servers: Server, started: Callable[[], None] = lambda: None, unless: Coroutine[Any, Any, None] | None = None
) -> None:
    """Start the servers in order, call `started`, serve until cancelled or until one ends; end them in reverse.

    When `unless` ends, which it does by an error, the servers end too, and its error is raised.
    """
    tasks: list[asyncio.Task[None]] = []
    watching = [] if unless is None else [asyncio.create_task(unless)]
    try:
        for server in servers:
            tasks.append(asyncio.create_task(_serve(server)))
            while not (server.started or tasks[-1].done()):  # noqa: ASYNC110 - uvicorn has no event for it
                await asyncio.sleep(0.01)
        if not any(task.done() for task in tasks):
            started()
        await asyncio.wait([*tasks, *watching], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for server, task in reversed(list(zip(servers, tasks, strict=False))):
            server.should_exit = True
            await asyncio.wait([task])
        for watch in watching:
            watch.cancel()
    for task in (*tasks, *(watch for watch in watching if watch.done())):
        task.result()  # a server that failed says so here


async def _serve(server: Server) -> None:
    try:
        await server.serve(sockets=[server.listener])
    except SystemExit as error:  # uvicorn's way to say so, which would fly through the event loop
        raise ConfigurationError("the server did not start; the reason is logged above") from error
