"""What the tests of operations work with."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from app.db import Pool
from tests.harness.verifying import Verified, system_to_verify


@pytest.fixture
async def system(database_url: str, pool: Pool, tmp_path: Path) -> AsyncIterator[Verified]:
    """A system to verify, as yet without orders."""
    async with system_to_verify(database_url, pool, tmp_path) as system:
        yield system
