"""The running service behaves as its OpenAPI document says, and no request makes it answer with a 5xx."""

import asyncio
import os
import sys
from pathlib import Path

from tests.harness.api import serving
from tests.harness.processes import REPOSITORY

ADMIN = "operator"
CONFIG = ("--config-file", str(REPOSITORY / "tests/harness/schemathesis.toml"))
OPTIONS = ("--max-examples=25", "--no-color", "--suppress-health-check=all")


async def test_schemathesis_finds_no_difference(database_url: str, redis_url: str, tmp_path: Path) -> None:
    """Schemathesis generates requests from the document, and checks every answer against it."""
    async with serving(database_url, redis_url=redis_url, admin_token=ADMIN) as api:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "schemathesis.cli", *CONFIG, "run", f"{api.base_url}/openapi.json", *OPTIONS),
            *("-H", f"Authorization: Bearer {ADMIN}"),
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "SCHEMATHESIS_HOOKS": "tests.harness.conformance"},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
