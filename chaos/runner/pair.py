"""A primary and its synchronous standby, which look like one server: `url` always leads to the current primary.

A COMMIT is answered when the standby has it too. After a failover commits wait until there is a new standby, which is a
copy of the new primary. So a server may be lost at any time, and again as soon as the next standby has caught up.
"""

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from chaos.proxy import postgres
from chaos.proxy.proxy import HOST, Proxy
from tests.harness.installed import Postgres
from tests.harness.standby import Standby, fetchval, require_standby
from tests.harness.wait import AMPLE_SECONDS, wait_until

ANY_STANDBY = "*"
IN_SYNC = "SELECT EXISTS (SELECT FROM pg_stat_replication WHERE state = 'streaming' AND sync_state = 'sync')"


class Pair:
    """Two servers below `directory`. It is killed, started and frozen as its primary is.

    `env` is added to the environment of both.
    """

    def __init__(self, directory: Path, env: Mapping[str, str]) -> None:
        self._directory = directory
        self._env = env
        self._failovers = 0
        self.primary = Postgres(directory, env=env)
        self.standby = Standby(directory / "standby", self.primary, env)
        self._address = Proxy(HOST, self.primary.port, frames=postgres)

    @property
    def url(self) -> str:
        """The URL of the current primary. It stays the same."""
        return self._address.url(self.primary.url)

    @property
    def port(self) -> int:
        """The port of the current primary, which a failover changes."""
        return self.primary.port

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_exit(self._stop)
            await stack.enter_async_context(self._address)
            await self.primary.start()
            await require_standby(self.primary, ANY_STANDBY)  # the standby copies the setting, too
            await self._start_standby()
            self._running = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._running.aclose()

    async def kill(self) -> None:
        """SIGKILL the primary."""
        await self.primary.kill()

    async def start(self) -> None:
        """Start the primary again."""
        await self.primary.start()

    def freeze(self) -> None:
        """Stop the primary (SIGSTOP)."""
        self.primary.freeze()

    def thaw(self) -> None:
        """Continue it (SIGCONT)."""
        self.primary.thaw()

    async def fail_over(self) -> None:
        """Promote the standby of a primary that was killed. `add_standby` has to follow, or no commit is answered."""
        lost, self.primary = self.primary, self.standby
        await self.primary.promote()
        self._address.redirect(HOST, self.primary.port)
        shutil.rmtree(lost.home)

    async def add_standby(self) -> None:
        """Give the primary a new standby, and return when commits wait for no other."""
        self._failovers += 1
        self.standby = Standby(self._directory / f"standby-{self._failovers}", self.primary, self._env)
        await self._start_standby()

    async def is_in_sync(self) -> bool:
        """Return whether the standby has all that the primary has answered."""
        return bool(await fetchval(self.primary.url, IN_SYNC))

    async def _start_standby(self) -> None:
        await self.standby.start()
        await wait_until(self.is_in_sync, AMPLE_SECONDS, "a standby in sync")

    async def _stop(self, *_: object) -> None:
        """Stop both. A primary that shuts down waits for its standby, so that ends first."""
        for server in (self.standby, self.primary):
            await server.stop()
