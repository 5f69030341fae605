"""The child processes of the demo: one that hangs while it starts, and one that waits for its restart."""

import contextlib
import signal
from pathlib import Path

import psutil
import pytest

from app.api.server import listener as server_listener
from app.demo.children import Child, PythonProgram
from app.errors import Unavailable
from tests.harness.wait import AMPLE_SECONDS, wait_until

MODULE = "app.demo.sandbox_process"


async def test_a_child_that_hangs_while_it_starts_is_ended(tmp_path: Path) -> None:
    """A child that is not ready in time is Unavailable, and its process is gone."""
    with contextlib.closing(server_listener.listen("127.0.0.1", 0)) as listener:
        program = PythonProgram(MODULE, listener, lambda: {"ledger": str(tmp_path / "ledger")}, 5, start_seconds=0.2)
        await program.spawn()
        process = psutil.Process(program.pid)
        process.suspend()
        with pytest.raises(Unavailable, match="was not ready within"):
            await program.start()
        assert not process.is_running()


async def test_a_restart_counts_when_it_has_succeeded(tmp_path: Path) -> None:
    """A child that is down has not been restarted yet, and says how long it will be away."""
    said: list[str] = []
    values = {"ledger": str(tmp_path / "ledger")}
    with contextlib.closing(server_listener.listen("127.0.0.1", 0)) as listener:
        program = PythonProgram(MODULE, listener, lambda: values, 5, start_seconds=AMPLE_SECONDS)
        child = Child("the sandbox", program, said.append)
        await child.start()
        try:
            child.kill(signal.SIGKILL, away_seconds=3600)
            await wait_until(lambda: any("ended" in line for line in said), AMPLE_SECONDS, "its end")
            assert (child.restarts, child.seconds_away > AMPLE_SECONDS) == (0, True)
            child.recover()
            await wait_until(lambda: child.restarts == 1, AMPLE_SECONDS, "its restart")
        finally:
            await child.stop()
