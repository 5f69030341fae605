"""Real servers for the tests that ask for them: started on first use, shared by the run, gone with it."""

import contextlib
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path

import httpx
import hypothesis
import pytest

from app.db import Pool
from app.partners.http import HttpClient
from tests.harness import brokers, caches, databases, ports, sandboxes
from tests.harness.browser import Visitors, visiting
from tests.harness.processes import Service, tail
from tests.harness.run import OWN, ControllerRun, Run
from tests.harness.sandboxes import Partners
from tests.harness.stripe_fake import StripeFake, stripe_fake

POOL_SIZE = 10
controller_run = pytest.StashKey[ControllerRun]()


# No test fails by the clock, so no example has a deadline and none is too slow: the machine may have stood still.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # set by xdist in its workers
        config.stash[controller_run] = ControllerRun()


def pytest_unconfigure(config: pytest.Config) -> None:
    if controller_run in config.stash:
        config.stash[controller_run].close()


@pytest.fixture(scope="session")
def run() -> Run:
    return Run.current()


@pytest.fixture(scope="session")
def postgres_url(run: Run) -> str:
    """A server to make databases in: the one of TEST_DATABASE_URL, or our own."""
    return run.server("postgres")


@pytest.fixture
async def database_url(postgres_url: str, run: Run) -> AsyncIterator[str]:
    """A migrated, empty database for this test alone."""
    async with databases.fresh(postgres_url, run) as url:
        yield url


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[Pool]:
    async with databases.patient_pool(database_url, POOL_SIZE) as pool:
        yield pool


@pytest.fixture
async def rabbitmq_url(run: Run) -> AsyncIterator[str]:
    """A vhost without the service's queues and exchanges, which no other test uses meanwhile."""
    async with brokers.clean(run) as url:
        yield url


@pytest.fixture
async def redis_url(run: Run) -> AsyncIterator[str]:
    """An empty Redis database, which no other test uses meanwhile."""
    async with caches.clean(run) as url:
        yield url


@pytest.fixture
def free_port() -> int:
    return ports.free_port()


@pytest.fixture
def server_directory(run: Run) -> Iterator[Path]:
    """A place for a test's own servers, which another user may reach (unlike `tmp_path`)."""
    directory = Path(tempfile.mkdtemp(dir=run.directory, prefix=OWN))
    directory.chmod(0o711)
    yield directory
    shutil.rmtree(directory, ignore_errors=True)  # it may be in memory; a server of ours may still be writing


@pytest.fixture
async def start_service(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[Service]]]:
    """Start `Service(env, args)` as often as wanted; the logs are shown when the test fails."""
    async with contextlib.AsyncExitStack() as services:

        async def start(env: dict[str, str], args: tuple[str, ...] = ("serve",), module: str = "app") -> Service:
            log = tmp_path / f"{args[0]}-{ports.free_port()}.log"
            services.callback(lambda: sys.stdout.write(tail(log)))
            return await services.enter_async_context(Service(env, args, log=log, module=module))

        yield start


@pytest.fixture
async def visitors() -> AsyncIterator[Visitors]:
    """A browser. The test fails if it complains of anything, or asks another host for anything."""
    async with visiting() as visitors:
        yield visitors


@pytest.fixture(scope="session")
def sandbox_url() -> Iterator[str]:
    """The partner sandbox of this worker; its ledger is one for all of its tests."""
    with sandboxes.in_a_thread() as url:
        yield url


@pytest.fixture
async def http(sandbox_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """Plain HTTP to the sandbox; faults set with it end with the test."""
    async with sandboxes.plain_http(sandbox_url) as client:
        yield client
        await client.delete("/faults")


@pytest.fixture
async def partner_http() -> AsyncIterator[HttpClient]:
    async with HttpClient() as http:
        yield http


@pytest.fixture
def partners_at(partner_http: HttpClient) -> Callable[..., Partners]:
    return partial(Partners.at, partner_http)


@pytest.fixture
async def stripe() -> AsyncIterator[StripeFake]:
    async with stripe_fake() as fake:
        yield fake


@pytest.fixture
def partners(partners_at: Callable[..., Partners], sandbox_url: str) -> Partners:
    return partners_at(sandbox_url)
