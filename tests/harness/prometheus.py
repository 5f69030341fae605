"""A real Prometheus as a private process: it scrapes targets of a test, evaluates rules, and answers queries."""

import json
import os
import shutil
import subprocess
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import httpx

from tests.harness.installed import Killable
from tests.harness.ports import free_port
from tests.harness.processes import REPOSITORY, ProcessTree, start_process, tail
from tests.harness.sandboxes import plain_http
from tests.harness.wait import AMPLE_SECONDS, wait_until

RULES = REPOSITORY / "deploy" / "prometheus" / "rules.yml"
RULES_TEST = RULES.with_name("rules_test.yml")
JOB = "orders"  # of every target; `up` and all metrics have it as label
SCRAPE_SECONDS = 1  # also between evaluations of the rules


class Prometheus(Killable):
    """A Prometheus below `directory` that scrapes `/metrics` of these ports of 127.0.0.1, with these rule files."""

    def __init__(self, directory: Path, ports: Collection[int] = (), rules: Sequence[Path] = (RULES,)) -> None:
        self._home = directory.resolve() / "prometheus"
        self._log = self._home / "log"
        self._targets = [f"127.0.0.1:{port}" for port in ports]
        self._rules = [str(path.resolve()) for path in rules]
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._tree = ProcessTree()

    async def __aenter__(self) -> Self:
        """Start it; return when it is ready to answer queries."""
        self._home.mkdir()
        configuration = self._home / "prometheus.json"
        configuration.write_text(json.dumps(self._configuration()))  # JSON is YAML
        options = {
            "config.file": configuration,
            "storage.tsdb.path": self._home / "data",
            "web.listen-address": f"127.0.0.1:{self.port}",
            "enable-feature": "exemplar-storage",
            "log.level": "warn",
        }
        command = [find_program("prometheus"), *(f"--{name}={value}" for name, value in options.items())]
        self._tree = ProcessTree(start_process(command, self._home, os.environ, self._log))
        try:
            await wait_until(self._is_ready, AMPLE_SECONDS, "200 from /-/ready of Prometheus")
        except BaseException as error:
            await self.kill()
            error.add_note(tail(self._log))
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    async def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the series of an instant query: `[{"metric": {…}, "value": [time, "1"]}]`. Raises HTTPStatusError."""
        data = await self._get("/api/v1/query", query=expression)
        found: list[dict[str, Any]] = data["result"]
        return found

    async def history(self, expression: str, start: float, end: float) -> list[dict[str, Any]]:
        """Return the series of a query for each second from `start` to `end`: `[{"metric": {…}, "values": […]}]`."""
        data = await self._get("/api/v1/query_range", query=expression, start=f"{start}", end=f"{end}", step="1")
        found: list[dict[str, Any]] = data["result"]
        return found

    async def value(self, expression: str) -> float | None:
        """Return the value of the only series of an instant query; None if there is no series."""
        series = await self.query(expression)
        assert len(series) <= 1, f"{expression} has {len(series)} series"
        return float(series[0]["value"][1]) if series else None

    async def exemplars(self, selector: str) -> list[dict[str, str]]:
        """Return the labels of every stored exemplar of these series."""
        data = await self._get("/api/v1/query_exemplars", query=selector, start="0", end="9999999999")
        return [exemplar["labels"] for series in data for exemplar in series["exemplars"]]

    async def rules(self) -> dict[str, dict[str, Any]]:
        """Return every rule by its name, with `health`, `lastError` and for alerts `state`."""
        groups = (await self._get("/api/v1/rules"))["groups"]
        return {rule["name"]: rule for group in groups for rule in group["rules"]}

    async def wait_for_scrape(self, expression: str = f'up{{job="{JOB}"}} == 1') -> None:
        """Wait until every target has been scraped, or until the expression has a series for each of them."""

        async def is_scraped() -> bool:
            return len(await self.query(expression)) >= len(self._targets)

        await wait_until(is_scraped, AMPLE_SECONDS, f"{expression} for {self._targets}")

    async def wait_for_evaluation(self) -> dict[str, dict[str, Any]]:
        """Wait until every rule has been evaluated; return the rules."""

        async def is_evaluated() -> bool:
            rules = await self.rules()
            return bool(rules) and all(rule["health"] != "unknown" for rule in rules.values())

        await wait_until(is_evaluated, AMPLE_SECONDS, "an evaluation of every rule")
        return await self.rules()

    async def _get(self, path: str, **parameters: str) -> Any:
        async with plain_http(self.url) as client:
            answer = await client.get(path, params=parameters)
        if answer.is_client_error:  # of the expression
            raise ValueError(f"{parameters}: {answer.json()['error']}")
        return answer.raise_for_status().json()["data"]

    async def _is_ready(self) -> bool:
        if any(process.poll() is not None for process in self._tree.leaders):
            raise RuntimeError("Prometheus ended while starting")
        try:
            async with plain_http(self.url) as client:
                return (await client.get("/-/ready")).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def _configuration(self) -> Mapping[str, Any]:
        every = f"{SCRAPE_SECONDS}s"
        return {
            "global": {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every},
            "rule_files": self._rules,
            "scrape_configs": [{"job_name": JOB, "static_configs": [{"targets": self._targets}]}],
        }


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run promtool, and return its exit code and output."""
    return subprocess.run([find_program("promtool"), *arguments], capture_output=True, text=True, check=False)


def find_program(name: str) -> str:
    """Return the path of `prometheus` or `promtool`. FileNotFoundError says what to install."""
    if path := shutil.which(name):
        return path
    raise FileNotFoundError(f"{name} is not installed: run scripts/install-servers, or `apt-get install prometheus`")
