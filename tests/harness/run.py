"""What one pytest run shares: a directory, and servers that start when first asked for and end with the run.

Every server has a keeper, a process that holds it until the run is over: until nobody has the pipe `alive`
open for writing any more. Only the controller has, so it may end well, by Ctrl-C or by SIGKILL.
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

import filelock
import psutil

from tests.harness.processes import REPOSITORY, is_alive, tail
from tests.harness.wait import wait_until

VARIABLE = "ORDERS_TEST_RUN"  # workers learn the directory from it
STOP_SECONDS = 40.0

_keepers: list[subprocess.Popen[str]] = []  # referred to as long as we live: a lost one warns of itself


class Run:
    """One pytest run, seen by any of its processes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.id = directory.name.rpartition("-")[2]

    @classmethod
    def current(cls) -> "Run":
        """Return the run that this process takes part in."""
        return cls(Path(os.environ[VARIABLE]))

    @property
    def worker(self) -> str:
        """The name of this worker, `gw0` when there are no workers."""
        return os.environ.get("PYTEST_XDIST_WORKER", "gw0")

    def lock(self, name: str) -> filelock.BaseFileLock:
        """Return a lock between the processes of the run."""
        return filelock.FileLock(self.directory / f"{name}.lock")

    def server(self, name: str) -> str:
        """Return the URL of the shared server `name`, one of the keeper's; the first to ask starts it."""
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
    """The run as its controller opens and closes it."""

    def __init__(self) -> None:
        super().__init__(Path(tempfile.mkdtemp(prefix="orders-test-")))
        self.directory.chmod(0o711)  # Postgres may have to run as another user: let it reach its own place
        os.mkfifo(self.directory / "alive")
        self._alive = os.open(self.directory / "alive", os.O_RDWR)
        os.environ[VARIABLE] = str(self.directory)

    def close(self) -> None:
        """Let the keepers stop their servers, wait for them, and remove everything."""
        records = [json.loads(record.read_text()) for record in self.directory.glob("*.json")]
        with contextlib.suppress(psutil.NoSuchProcess):
            keepers = [psutil.Process(record["pid"]) for record in records]
            os.close(self._alive)
            asyncio.run(wait_until(lambda: not any(map(is_alive, keepers)), STOP_SECONDS, "end of the servers"))
        for log in self.directory.glob("*.log"):
            sys.stderr.write(log.read_text())  # of a keeper: empty, unless it failed
        shutil.rmtree(self.directory)
