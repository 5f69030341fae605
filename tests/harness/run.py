"""The resources of one pytest run: a directory, and servers that start at their first use and end with the run.

Every server has a keeper, a process that stops it when the run is over: when the last writer of the pipe `alive` has
closed it. Only the controller writes to it, so this works whether it ends normally, by Ctrl-C or by SIGKILL.
"""

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import filelock
import psutil

from tests.harness import containers
from tests.harness.ports import VARIABLE
from tests.harness.processes import REPOSITORY, is_alive, tail
from tests.harness.wait import wait_until

OWN = "test-"  # prefix of the directories for a test's own servers
STOP_SECONDS = 90.0
MEMORY = Path("/dev/shm")  # noqa: S108 - the run uses a directory of its own there
AMPLE_BYTES = 4 * 2**30

_keepers: list[subprocess.Popen[str]] = []  # referred to as long as we live: a lost one warns of itself


def given(variable: str, port: int) -> str | None:
    """Return the URL in an environment variable, if it is set, with an explicit port, which proxies need."""
    url = os.environ.get(variable)
    if not url or urlsplit(url).port:
        return url or None
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=f"{parts.netloc.removesuffix(':')}:{port}"))


class Run:
    """One pytest run, as any of its processes sees it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.id = directory.name.rpartition("-")[2]

    @classmethod
    def current(cls) -> "Run":
        """Return the run of this process."""
        return cls(Path(os.environ[VARIABLE]))

    @property
    def worker(self) -> str:
        """The name of this worker, `gw0` when there are no workers."""
        return os.environ.get("PYTEST_XDIST_WORKER", "gw0")

    def lock(self, name: str) -> filelock.BaseFileLock:
        """Return a lock between the processes of the run."""
        return filelock.FileLock(self.directory / f"{name}.lock")

    @property
    def has_containers(self) -> bool:
        """Whether servers run in containers: decided once, when the first one starts."""
        with self.lock("containers"):
            decision = self.directory / "containers"
            if not decision.exists():
                # A process of its own: a client that found no engine would leave its socket for ours to warn of.
                asked = subprocess.run([sys.executable, "-m", "tests.harness.containers"], cwd=REPOSITORY, check=False)
                decision.write_text("no" if asked.returncode else "yes")
            return decision.read_text() == "yes"

    def server(self, name: str) -> str:
        """Return the URL of the shared server `name`, one of the keeper's. The first call starts it."""
        with self.lock(name):
            record = self.directory / f"{name}.json"
            if not record.exists():
                record.write_text(self._start_keeper(name))
            url: str = json.loads(record.read_text())["url"]
            return url

    def _start_keeper(self, name: str) -> str:
        log = self.directory / f"{name}.log"
        with log.open("wb") as errors:
            keeper = subprocess.Popen(
                [sys.executable, "-m", "tests.harness.keeper", name, str(self.directory)],
                cwd=REPOSITORY,
                text=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,  # Ctrl-C is the controller's to handle
            )
        _keepers.append(keeper)
        with keeper.stdout or contextlib.nullcontext() as output:
            line = output.readline() if output else ""
        if not line:
            raise RuntimeError(f"no {name} for the tests\n{tail(log)}")
        return line


class ControllerRun(Run):
    """The run in its controller, which opens and closes it."""

    def __init__(self) -> None:
        super().__init__(Path(tempfile.mkdtemp(prefix="orders-test-", dir=_quick_place())))
        self.directory.chmod(0o711)  # Postgres may have to run as another user: let it reach its own place
        os.mkfifo(self.directory / "alive")
        self._alive = os.open(self.directory / "alive", os.O_RDWR)
        os.environ[VARIABLE] = str(self.directory)

    def close(self) -> None:
        """Make the keepers stop their servers, wait for them, and remove everything."""
        records = [json.loads(record.read_text()) for record in self.directory.glob("*.json")]
        with contextlib.suppress(psutil.NoSuchProcess):
            keepers = [psutil.Process(record["pid"]) for record in records]
            os.close(self._alive)
            asyncio.run(wait_until(lambda: not any(map(is_alive, keepers)), STOP_SECONDS, "end of the servers"))
        for log in self.directory.glob("*.log"):
            sys.stderr.write(log.read_text())  # of a keeper: empty, unless it failed
        try:
            if (self.directory / "containers").exists() and self.has_containers:
                containers.remove_all(self.directory)
        finally:
            shutil.rmtree(self.directory)


def _quick_place() -> Path | None:
    """Return a directory in memory, if there is enough room: creating a database takes a fifth of the time there.

    Data in it survives a killed server, as on a disk. It need not survive the machine.
    """
    roomy = MEMORY.is_dir() and min(shutil.disk_usage(MEMORY).free, psutil.virtual_memory().available) >= AMPLE_BYTES
    return MEMORY if roomy and os.access(MEMORY, os.W_OK) else None
