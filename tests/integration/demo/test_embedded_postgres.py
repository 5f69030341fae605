"""The PostgreSQL of `orders demo`: it keeps its data, admits no one else, and leaves no process behind."""

import os
import subprocess
import sys
from pathlib import Path

import asyncpg
import psutil
import pytest

from app.demo.embedded_postgres import EmbeddedPostgres, find_binaries, running_url
from app.errors import ConfigurationError, DatabaseUnavailable
from tests.harness.installed import Postgres
from tests.harness.processes import REPOSITORY, is_alive
from tests.harness.wait import AMPLE_SECONDS, wait_until

# What `orders demo` does, in a process that can be killed: the first line it prints is the postmaster's pid.
OWNER = """
import asyncio, pathlib, sys
from app.demo.embedded_postgres import EmbeddedPostgres, find_binaries

async def main():
    async with EmbeddedPostgres(pathlib.Path(sys.argv[1]), find_binaries(), settings={"fsync": "off"}) as server:
        print(server.process.pid, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def remember(url: str, what: str) -> None:
    conn = await asyncpg.connect(url)
    await conn.execute("CREATE TABLE IF NOT EXISTS remembered (what text)")
    await conn.execute("INSERT INTO remembered VALUES ($1)", what)
    await conn.close()


async def recall(url: str) -> list[str]:
    conn = await asyncpg.connect(url)
    rows = await conn.fetch("SELECT what FROM remembered")
    await conn.close()
    return [row["what"] for row in rows]


def start_and_kill_owner(directory: Path, environment: dict[str, str]) -> psutil.Process:
    """Run a server in a process that is then killed; return the postmaster."""
    command = [sys.executable, "-c", OWNER, str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=REPOSITORY, env=environment) as owner:
        assert owner.stdout
        postmaster = psutil.Process(int(owner.stdout.readline()))
        owner.kill()
    return postmaster


async def test_data_survives_stop_and_start(server_directory: Path) -> None:
    """A second run on the same directory finds the data of the first."""
    server = Postgres(server_directory)
    async with server:
        await remember(server.url, "kept")
    async with server:
        assert await recall(server.url) == ["kept"]


async def test_the_next_run_reuses_password_and_data(server_directory: Path) -> None:
    """A second server on the same directory has the same password."""
    async with Postgres(server_directory) as first:
        await remember(first.url, "kept")
    async with Postgres(server_directory) as second:
        assert await recall(second.url) == ["kept"]


async def test_committed_data_survives_sigkill_of_every_process(server_directory: Path) -> None:
    """Recovery restores every committed row."""
    async with Postgres(server_directory) as server:
        await remember(server.url, "committed")
        await server.kill()
        await server.start()
        assert await recall(server.url) == ["committed"]


async def test_a_second_run_is_refused_and_harmless(server_directory: Path) -> None:
    """The directory is locked, and the running server is not affected."""
    async with Postgres(server_directory) as server:
        with pytest.raises(ConfigurationError, match="another run is using"):
            await Postgres(server_directory).start()
        await remember(server.url, "unharmed")


async def test_it_listens_on_the_loopback_address_only(server_directory: Path) -> None:
    """The server has one listening socket, on 127.0.0.1."""
    async with Postgres(server_directory) as server:
        sockets = psutil.Process(server.process.pid).net_connections("all")
        listening = {tuple(s.laddr) for s in sockets if s.status == psutil.CONN_LISTEN or s.family.name == "AF_UNIX"}
        assert listening == {("127.0.0.1", server.port)}


async def test_it_requires_the_password(server_directory: Path) -> None:
    """A connection without the password is refused."""
    async with Postgres(server_directory) as server:
        for password in ("wrong", ""):
            with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError):
                await asyncpg.connect(server.url, password=password)
        files = [server.home, server.home / "data", server.home / "password"]
        assert [oct(path.stat().st_mode & 0o777) for path in files] == ["0o700", "0o700", "0o600"]


async def test_it_runs_below_a_closed_directory(tmp_path: Path) -> None:
    """It runs below a directory that other users cannot enter."""
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    async with Postgres(private) as server:
        await remember(server.url, "here")
    assert private.stat().st_mode & 0o777 == 0o700


async def test_no_process_is_left_after_the_end(server_directory: Path) -> None:
    """After `stop` no process of the server exists."""
    async with Postgres(server_directory) as server:
        postmaster = psutil.Process(server.process.pid)
        processes = [postmaster, *postmaster.children(recursive=True)]
    assert not [process for process in processes if is_alive(process)]
    with pytest.raises(DatabaseUnavailable):
        running_url(server_directory)


async def test_a_killed_owner_stops_its_server(server_directory: Path) -> None:
    """The server ends when the process that started it is killed."""
    postmaster = start_and_kill_owner(server_directory, dict(os.environ))
    await wait_until(lambda: not is_alive(postmaster), AMPLE_SECONDS, "end of the server")


async def test_the_next_run_stops_a_leftover_server(server_directory: Path) -> None:
    # Without `setpriv`, as on some systems, the server cannot be tied to its owner.
    """A server that outlived its owner is stopped before the new one starts."""
    postmaster = start_and_kill_owner(server_directory, {**os.environ, "PATH": "/nowhere"})
    assert is_alive(postmaster)
    await remember(running_url(server_directory), "by the former run")
    async with Postgres(server_directory) as server:
        await wait_until(lambda: not is_alive(postmaster), AMPLE_SECONDS, "end of the former server")
        assert await recall(server.url) == ["by the former run"]


async def test_a_frozen_server_continues(server_directory: Path) -> None:
    """After SIGSTOP and SIGCONT the server works as before."""
    async with Postgres(server_directory) as server:
        conn = await asyncpg.connect(server.url)
        server.freeze()
        with pytest.raises(TimeoutError):
            await asyncpg.connect(server.url, timeout=0.2)
        server.thaw()
        assert await conn.fetchval("SELECT 1") == 1
        await conn.close()


async def test_a_failed_start_shows_the_end_of_the_log(server_directory: Path) -> None:
    """The error of a failed start contains the end of the server's log."""
    server = EmbeddedPostgres(server_directory, find_binaries(), settings={"fsync": "off", "no_such": "setting"})
    with pytest.raises(DatabaseUnavailable, match="unrecognized configuration parameter"):
        await server.start()


def test_a_directory_without_binaries_names_the_setting(tmp_path: Path) -> None:
    """The error names ORDERS_PG_BIN."""
    with pytest.raises(ConfigurationError, match="ORDERS_PG_BIN"):
        find_binaries(str(tmp_path))


def test_binaries_need_initdb_too() -> None:
    """The directory found has `initdb` too, and can be chosen by name."""
    assert (find_binaries() / "initdb").is_file()
    assert find_binaries(str(find_binaries())) == find_binaries()
