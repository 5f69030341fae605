"""Real servers in containers, of the images that docker-compose.yml names, to be killed and frozen like processes.

A container keeps its port and its data from one start to the next, and is removed, data included, when the run ends, by
its controller or its keepers; if those are killed too, testcontainers' reaper does it.

`python -m tests.harness.containers` exits with 0 where containers can be run; with `--pull` it fetches what is missing.
"""

import asyncio
import contextlib
import functools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Self

import docker
import yaml
from docker.types import Ulimit
from testcontainers.core.config import testcontainers_config
from testcontainers.core.container import DockerContainer
from testcontainers.core.docker_client import DockerClient

from tests.harness import installed
from tests.harness.ports import free_port
from tests.harness.processes import REPOSITORY
from tests.harness.wait import wait_until

LABEL = "orders.test.run"  # its value is the run's directory
START_SECONDS = 180.0
OPEN_FILES = 16_384  # Erlang allocates memory for as many as it may open, and in a container that can be a billion
DEFINITIONS = "/etc/rabbitmq/definitions.json"


def available(*, pull: bool = False) -> bool:
    """Tell whether there is an engine on this machine that has the images, or can `pull` them."""
    try:
        engine = DockerClient()
        with contextlib.closing(engine.client) as client:
            return engine.host() in {"localhost", "127.0.0.1"} and all(_has(client, name, pull) for name in _images())
    except docker.errors.DockerException as error:
        if pull:
            sys.stderr.write(f"Tests will not use containers: {error}\n")
        return False


def _has(client: docker.DockerClient, name: str, pull: bool) -> bool:
    try:
        client.images.get(name)
    except docker.errors.ImageNotFound:
        if not pull:
            return False
        sys.stderr.write(f"Pulling {name} ...\n")
        client.images.pull(name)
    return True


def _images() -> list[str]:
    reaper = [] if testcontainers_config.ryuk_disabled else [testcontainers_config.ryuk_image]
    return [*map(image, ("postgres", "redis", "rabbitmq")), *reaper]


def remove_all(directory: Path) -> None:
    """Remove every container of the run that has this directory, and its data. Others may do so at the same time."""
    with contextlib.closing(DockerClient().client) as client:
        of_run = {"label": f"{LABEL}={directory}"}
        for container in client.containers.list(all=True, filters=of_run, ignore_removed=True):
            with _already():
                container.remove(force=True, v=True)


@contextlib.contextmanager
def _already() -> Iterator[None]:
    """Let what is to be removed be gone or on its way, and what is to be killed be dead."""
    try:
        yield
    except docker.errors.APIError as error:
        if error.status_code not in {HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT}:
            raise


@functools.cache
def image(service: str) -> str:
    """Return the image of a service, as users run it."""
    composition = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())
    return str(composition["services"][service]["image"])


class Container:
    """One server in a container. `files`: what it finds in its file system, by path."""

    def __init__(
        self,
        run: Path,
        service: str,
        port: int,
        *,
        command: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        files: Mapping[str, str] | None = None,
    ) -> None:
        self.port = free_port()
        self._running = False
        self._frozen = False
        limits = [Ulimit(name="nofile", soft=OPEN_FILES, hard=OPEN_FILES)]
        self._container = DockerContainer(image(service)).with_kwargs(labels={LABEL: str(run)}, ulimits=limits)
        self._container.with_envs(**(env or {}))
        if command:
            self._container.with_command(list(command))
        # An address is a port to docker-py, not to the annotation of testcontainers.
        self._container.ports[str(port)] = ("127.0.0.1", self.port)  # type: ignore[assignment]
        for path, text in (files or {}).items():
            self._container.with_copy_into_container(text.encode(), path)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()
        self._container.get_docker_client().client.close()

    async def start(self) -> None:
        """Return when it serves; start it, or start it again, on the same data and port."""
        await asyncio.to_thread(self._start)
        self._running = True
        try:
            await wait_until(self._is_ready, START_SECONDS, f"service by the container of {self._container.image}")
        except BaseException as error:
            error.add_note(self._container.get_wrapped_container().logs(tail=60).decode(errors="replace"))
            await self.kill()
            raise

    async def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        if self._running:
            self.thaw()
            self._running = False
            with _already():
                await asyncio.to_thread(self._container.get_wrapped_container().kill)
            await asyncio.to_thread(self._container.get_wrapped_container().wait)

    def freeze(self) -> None:
        """Stop every process of it where it is."""
        self._container.get_wrapped_container().pause()
        self._frozen = True

    def thaw(self) -> None:
        """Let them go on."""
        if self._frozen:
            self._container.get_wrapped_container().unpause()
            self._frozen = False

    def _start(self) -> None:
        if self._container.status == "not_started":
            self._container.start()
        else:
            self._container.get_wrapped_container().start()

    async def _is_ready(self) -> bool:
        await asyncio.to_thread(self._container.reload)
        if self._container.status == "exited":
            raise RuntimeError(f"the container of {self._container.image} ended while starting")
        return await self._serves()

    async def _serves(self) -> bool:
        raise NotImplementedError


class Postgres(Container):
    """A private PostgreSQL."""

    def __init__(self, run: Path) -> None:
        settings = [f"-c{name}={value}" for name, value in installed.POSTGRES_SETTINGS.items()]
        super().__init__(run, "postgres", 5432, command=["postgres", *settings], env={"POSTGRES_PASSWORD": "orders"})
        self.url = f"postgresql://postgres:orders@127.0.0.1:{self.port}/postgres"

    async def _serves(self) -> bool:
        return await installed.postgres_answers(self.url)


class Redis(Container):
    """A private Redis, which keeps nothing on disk."""

    def __init__(self, run: Path) -> None:
        super().__init__(run, "redis", 6379, command=["redis-server", "--save", ""])
        self.url = f"redis://127.0.0.1:{self.port}/0"

    async def _serves(self) -> bool:
        return await installed.redis_answers(self.port)


class RabbitMQ(Container):
    """A private RabbitMQ with these vhosts."""

    def __init__(self, run: Path, vhosts: Sequence[str] = ("w0",)) -> None:
        files = {
            "/etc/rabbitmq/conf.d/90-tests.conf": f"load_definitions = {DEFINITIONS}\n",
            DEFINITIONS: json.dumps(installed.rabbitmq_definitions(vhosts)),
        }
        super().__init__(run, "rabbitmq", 5672, files=files)

    def url(self, vhost: str = "w0") -> str:
        """Return the URL of one vhost, with user and password."""
        return installed.rabbitmq_url(self.port, vhost)

    async def sync(self) -> None:
        """Have the declarations so far written to disk; see `installed.RabbitMQ.sync`."""
        command = ["rabbitmqctl", "eval", installed.SYNC_DECLARATIONS]
        result = await asyncio.to_thread(self._container.exec, command)
        if result.exit_code:
            raise RuntimeError(f"rabbitmqctl ended with {result.exit_code}: {result.output!r}")

    async def _serves(self) -> bool:
        return await installed.rabbitmq_answers(self.port)


if __name__ == "__main__":
    sys.exit(not available(pull="--pull" in sys.argv))
