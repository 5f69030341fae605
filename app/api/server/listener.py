"""Run ASGI applications until SIGINT or SIGTERM, then let them finish. Every command that serves uses this."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import uvicorn

from app.errors import ConfigurationError

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Longer than clients and proxies usually keep an idle connection (60 s), so that they close it first. If the server
# closed it, a request could be on its way, and its sender could not tell whether it was processed.
KEEP_ALIVE_SECONDS = 75


class Server(uvicorn.Server):
    """uvicorn on our own socket, without its signal handling.

    uvicorn raises the signal again when it is done, which would end the process by the signal and not with exit code 0.
    Two servers in one process would also overwrite each other's handlers.
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
                # The end of a response starts the next request of the connection, which must not inherit its trace.
                reset_contextvars=True,
                timeout_keep_alive=keep_alive_seconds,
                # Half of the time is for open requests, the rest for the roles, which stop after them.
                timeout_graceful_shutdown=max(1, int(shutdown_seconds / 2)),
            )
        )
        self.listener = listener
        self._stopping = stopping

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Call `stopping`, which answers long polls, before waiting for open requests."""
        self._stopping()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to `until_signalled`."""
        yield


def listen(host: str, port: int) -> socket.socket:
    """Bind a socket. Call it before anything else starts, so that a port in use is reported in one clear line.

    Raises ConfigurationError.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = host == "::" and socket.has_dualstack_ipv6()
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048, dualstack_ipv6=both)
    except OSError as error:
        raise ConfigurationError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    # Every connection inherits this option. Without it a response's body waits until the client acknowledges its head:
    # 40 ms. uvloop sets it itself, but asyncio only for sockets that were created with a protocol.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


async def until_signalled(work: Coroutine[Any, Any, None]) -> None:
    """Run `work` to its end, or cancel it on SIGINT or SIGTERM and wait for its cleanup; then return normally.

    Run a whole command in it, including its start, so that a signal at any time leads to an orderly end.
    """
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(work)
    signalled = asyncio.Event()

    def stop() -> None:
        if not signalled.is_set():  # once: a second signal must not interrupt the cleanup
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
    """Start the servers in order, call `started`, serve until cancelled or until one ends; stop them in reverse order.

    When `unless` ends, which it does with an error, stop the servers and raise its error.
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
        task.result()  # raises the error of a server that failed


async def _serve(server: Server) -> None:
    try:
        await server.serve(sockets=[server.listener])
    except SystemExit as error:  # uvicorn reports a failed start like this, and it would end the event loop
        raise ConfigurationError("the server did not start; the reason is logged above") from error
