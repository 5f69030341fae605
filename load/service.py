"""The HTTP calls of a run, to the service and to the partners' ledger."""

import asyncio
import email.utils
import itertools
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

REQUEST_SECONDS = 10.0
PAGE = 100
LEDGER_PAGE = 1000
CLOCK_SECONDS = 2  # `Date` has whole seconds, and processes of the service may differ a little
RETRY_SECONDS = 0.5
OK, NOT_FOUND = 200, 404

NETWORK_ERRORS = (aiohttp.ClientError, OSError, TimeoutError)


class CannotCheck(Exception):
    """The run could not be judged: the service or the ledger cannot be read."""


class Service:
    """A running service, and the partners' ledger (`sandbox_url`). Calls go to its `urls` in turn."""

    def __init__(self, session: aiohttp.ClientSession, urls: Sequence[str], sandbox_url: str, token: str) -> None:
        self._session = session
        self._urls = itertools.cycle(url.rstrip("/") for url in urls)
        self._sandbox_url = sandbox_url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    async def place(self, key: str, body: Mapping[str, Any], timeout_seconds: float) -> tuple[int, str, bytes]:
        """Send one `POST /orders`. Return status, Location and body. Raises NETWORK_ERRORS."""
        async with asyncio.timeout(timeout_seconds):
            headers = {"Idempotency-Key": key, **self._headers}
            async with self._session.post(f"{next(self._urls)}/orders", json=body, headers=headers) as response:
                return response.status, response.headers.get("Location", ""), await response.read()

    async def find_start(self) -> datetime:
        """Return an instant just before now, by the service's clock. Raises CannotCheck."""
        url = next(self._urls)
        try:
            async with self._session.get(f"{url}/livez", headers=self._headers) as response:
                now = email.utils.parsedate_to_datetime(response.headers["Date"])
        except (*NETWORK_ERRORS, KeyError, ValueError) as error:
            raise CannotCheck(f"no service answers at {url}: {_describe(error)}") from error
        return now.astimezone(UTC) - timedelta(seconds=CLOCK_SECONDS)

    async def require_access(self) -> None:
        """Check that orders can be read, for example with this token. Raises CannotCheck."""
        await self._get("/orders", {"limit": 1}, patience_seconds=0)

    async def require_ledger(self) -> None:
        """Check that the partners' ledger can be read. Raises CannotCheck."""
        await self._get_from(self._sandbox_url, "/ledger/summary", {"limit": 1}, patience_seconds=0)

    async def orders(self, placed_after: datetime, patience_seconds: float, **filters: str) -> AsyncIterator[Any]:
        """Yield the orders placed since then, newest first. Raises CannotCheck."""
        query: dict[str, str | int] = {"placed_after": placed_after.isoformat(), "limit": PAGE, **filters}
        while True:
            page = await self._get("/orders", query, patience_seconds)
            for order in page["orders"]:
                yield order
            if page["next_cursor"] is None:
                return
            query["cursor"] = page["next_cursor"]

    async def find_order(self, order_id: str, patience_seconds: float) -> Any | None:
        """Return an order; None if there is none. Raises CannotCheck."""
        return await self._get(f"/orders/{order_id}", {}, patience_seconds, missing=None)

    async def why_stuck(self, order_id: str) -> str | None:
        """Return what an unfinished order waits for, if the service says so."""
        try:
            story = await self._get(f"/orders/{order_id}/timeline", {}, patience_seconds=0, missing={})
        except CannotCheck:
            return None
        return (story.get("why_stuck") or {}).get("message")

    async def ledger(self, patience_seconds: float) -> AsyncIterator[tuple[str, Mapping[str, Any]]]:
        """Yield (saga id, sums) of every saga in the partners' ledger. Raises CannotCheck."""
        query: dict[str, str | int] = {"limit": LEDGER_PAGE}
        while True:
            page = await self._get_from(self._sandbox_url, "/ledger/summary", query, patience_seconds)
            for saga_id, row in page["sagas"].items():
                yield saga_id, row
            if len(page["sagas"]) < LEDGER_PAGE or (last := max(page["sagas"])) == query.get("after"):
                return
            query["after"] = last

    async def stock(self, item: str, patience_seconds: float) -> Mapping[str, int]:
        """Return the free, held and sold quantity of an item. Raises CannotCheck."""
        found: Mapping[str, int] = await self._get_from(
            self._sandbox_url, f"/v1/inventory/stock/{item}", {}, patience_seconds
        )
        return found

    async def backlog(self) -> dict[str, float]:
        """Return events that wait in the outbox, and unfinished sagas, as far as the service shows them."""
        try:
            async with asyncio.timeout(RETRY_SECONDS), self._session.get(f"{next(self._urls)}/metrics") as response:
                families = {family.name: family for family in text_string_to_metric_families(await response.text())}
        except (*NETWORK_ERRORS, ValueError):
            return {}
        names = {"outbox": "outbox_pending", "sagas": "saga_in_flight"}
        return {
            short: sum(sample.value for sample in families[name].samples)
            for short, name in names.items()
            if name in families
        }

    async def _get(self, path: str, query: Mapping[str, Any], patience_seconds: float, **missing: Any) -> Any:
        return await self._get_from(None, path, query, patience_seconds, **missing)

    async def _get_from(
        self, url: str | None, path: str, query: Mapping[str, Any], patience_seconds: float, **missing: Any
    ) -> Any:
        """Return the JSON of a GET. `url` None: the service's next one. `missing`: what a 404 stands for."""
        timeout = aiohttp.ClientTimeout(total=REQUEST_SECONDS)
        deadline = asyncio.get_running_loop().time() + patience_seconds
        while True:
            where = f"{url or next(self._urls)}{path}"
            try:
                async with self._session.get(where, params=query, headers=self._headers, timeout=timeout) as response:
                    if response.status == NOT_FOUND and "missing" in missing:
                        return missing["missing"]
                    if response.status == OK:
                        return await response.json()
                    problem = f"{response.status}: {(await response.text())[:200]}"
            except (*NETWORK_ERRORS, ValueError) as error:
                problem = _describe(error)
            if asyncio.get_running_loop().time() >= deadline:
                raise CannotCheck(f"cannot read {where}: {problem}")
            await asyncio.sleep(RETRY_SECONDS)


def _describe(error: BaseException) -> str:
    return str(error) or type(error).__name__
