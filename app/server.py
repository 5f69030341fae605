"""Runs ASGI applications until SIGINT or SIGTERM, then lets them finish; shared by every command that serves."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from app.errors import ConfigurationError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Server(uvicorn.Server):
    """uvicorn on a socket of ours, without its signal handling.

    uvicorn raises the signal again when it is done, which would end the process by the signal instead of with exit
    code 0; and two servers in one process would overwrite each other's handlers.
    """

    def __init__(self, app: Any, listener: socket.socket, shutdown_seconds: float, http: Any = "auto") -> None:
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
                # Half of the time for open requests, the rest for the roles, which stop after them.
                timeout_graceful_shutdown=max(1, int(shutdown_seconds / 2)),
            )
        )
        self.listener = listener

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to `run`."""
        yield


def listen(host: str, port: int) -> socket.socket:
    """Bind before anything else starts, so that a taken port is one clear line. Raises ConfigurationError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigurationError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error


async def run(*servers: Server, started: Callable[[], None] = lambda: None) -> None:
    """Start the servers in order, call `started`, serve until a signal arrives or one ends; end them in reverse."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in SIGNALS:
        loop.add_signal_handler(number, stop.set)
    tasks: list[asyncio.Task[None]] = []
    try:
        for one in servers:
            task = asyncio.create_task(one.serve(sockets=[one.listener]))
            task.add_done_callback(lambda _: stop.set())
            tasks.append(task)
            while not (one.started or task.done()):  # noqa: ASYNC110 - uvicorn has no event for it
                await asyncio.sleep(0.01)
        if not stop.is_set():
            started()
        await stop.wait()
    finally:
        for one, task in reversed(list(zip(servers, tasks, strict=False))):
            one.should_exit = True
            await asyncio.wait([task])
        for number in SIGNALS:
            loop.remove_signal_handler(number)
    for task in tasks:
        task.result()  # a server that failed says so here
