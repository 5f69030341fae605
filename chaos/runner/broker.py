"""RabbitMQ as one node or several, which look like one broker. With three, each quorum queue has three members."""

import asyncio
import contextlib
import os
import secrets
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from tests.harness.installed import RABBITMQ_SCRIPT, RABBITMQ_START_SECONDS, RabbitMQ, port_mapper
from tests.harness.ports import free_port
from tests.harness.processes import ProcessTree, start_process
from tests.harness.wait import wait_until

STOP_SECONDS = 60.0
START_ATTEMPTS = 3
COOKIE = ".erlang.cookie"
# What operators of three nodes set: a node that sees no majority stops, instead of going on by itself.
CLUSTER = """
cluster_formation.peer_discovery_backend = classic_config
cluster_partition_handling = pause_minority
"""


class Node(RabbitMQ):
    """One node. `peers`: the names of all nodes, itself included, in the order in which they start first."""

    start_seconds = RABBITMQ_START_SECONDS / START_ATTEMPTS

    def __init__(
        self, directory: Path, name: str, epmd_port: int, peers: Sequence[str], cookie: str, env: Mapping[str, str]
    ) -> None:
        super().__init__(directory, name=name, env=env)
        self._epmd_port = epmd_port
        self._peers = peers
        self._cookie = cookie

    def _commands(self) -> list[list[str]]:
        return [[str(RABBITMQ_SCRIPT)]]  # the port mapper is the cluster's, and outlives a node

    def _configure(self) -> None:
        super()._configure()
        if len(self._peers) == 1:
            return
        nodes = [f"cluster_formation.classic_config.nodes.{n} = {peer}@localhost" for n, peer in enumerate(self._peers)]
        with (self.home / "rabbitmq.conf").open("a") as config:
            config.write(CLUSTER + "\n".join(nodes) + "\n")
        cookie = self.home / COOKIE
        if not cookie.exists():
            cookie.touch(mode=0o600)
            cookie.write_text(self._cookie)
            cookie.chmod(0o400)

    async def start(self) -> None:
        """Start it; again if it ends at once, or hangs.

        libfiu, by which its disk fails, now and then breaks Erlang's helper. Once it hung, silently, on restored files.
        """
        for _ in range(START_ATTEMPTS - 1):
            with contextlib.suppress(RuntimeError, AssertionError):
                await super().start()
                return
        await super().start()

    async def stop(self) -> None:
        """Shut it down cleanly."""
        for process in self._tree.leaders:
            process.send_signal(signal.SIGTERM)
        await wait_until(self._has_ended, STOP_SECONDS, f"end of {self.node}")
        await self.kill()

    def _has_ended(self) -> bool:
        return all(process.poll() is not None for process in self._tree.leaders)


class Broker:
    """`count` nodes below `directory`. It is killed, started and frozen with all of them.

    `env` is added to the environment of each.
    """

    def __init__(self, directory: Path, count: int, env: Mapping[str, str]) -> None:
        self._directory = directory
        self._epmd_port = free_port()
        cookie, names = secrets.token_hex(10), [f"node{number + 1}" for number in range(count)]
        self.nodes = [Node(directory, name, self._epmd_port, names, cookie, env) for name in names]
        self.present = self.nodes[0]  # the node that new connections should use
        self._epmd = ProcessTree()

    @property
    def port(self) -> int:
        """The port of that node."""
        return self.present.port

    def url(self, vhost: str = "w0") -> str:
        """Return the URL of a vhost on that node."""
        return self.present.url(vhost)

    async def __aenter__(self) -> Self:
        log = self._directory / "epmd-output"
        self._epmd = ProcessTree(start_process(port_mapper(self._epmd_port), self._directory, os.environ, log))
        try:
            for node in self.nodes:  # the first one makes the cluster, and the others join it
                await node.start()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()
        await self._epmd.kill()

    async def kill(self) -> None:
        """SIGKILL all nodes."""
        await asyncio.gather(*(node.kill() for node in self.nodes))

    async def start(self) -> None:
        """Start all nodes again. They wait for each other."""
        await asyncio.gather(*(node.start() for node in self.nodes))

    def freeze(self) -> None:
        """Stop all nodes (SIGSTOP)."""
        for node in self.nodes:
            node.freeze()

    def thaw(self) -> None:
        """Continue them (SIGCONT)."""
        for node in self.nodes:
            node.thaw()

    def save(self) -> None:
        """Copy the data of all nodes, for `restore`. None may run."""
        for node in self.nodes:
            node.save()

    def restore(self) -> None:
        """Return to the data of the last `save`. No node may run."""
        for node in self.nodes:
            node.restore()

    async def sync(self) -> None:
        """Write all declarations to disk now; see `RabbitMQ.sync`."""
        await asyncio.gather(*(node.sync() for node in self.nodes))

    def leave(self, node: Node) -> None:
        """Let new connections use another node than this."""
        if node is self.present:
            self.present = self.nodes[(self.nodes.index(node) + 1) % len(self.nodes)]
