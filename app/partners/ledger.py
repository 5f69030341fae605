"""Read a partner's ledger, where it has one: the sandbox does, real partners usually do not.

Pages are ordered by saga id. A partner without a ledger answers 404; `verify` then asks for each saga by itself.
"""

import asyncio
import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import urlencode

from app.errors import PartnerUnavailable
from app.partners.http import HttpClient, Interrupted, NotConnected, Reply, Target
from app.values import immutable

MAX_PAGE_BYTES = 4 * 1024 * 1024
DETAILS: Mapping[str, str | int] = {"details": "true"}  # moves and items
NO_LEDGER = frozenset(
    {HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED, HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}
)


@immutable
class LedgerClient:
    """Reads the ledger at `base_url`. A request ends within `timeout_seconds`."""

    http: HttpClient
    base_url: str
    timeout_seconds: float

    async def exists(self) -> bool:
        """Return whether this partner has a ledger. Raises PartnerUnavailable."""
        return await self._get("/ledger/summary", {"limit": 1}) is not None

    async def read_sagas(self, after: str, limit: int) -> Mapping[str, Mapping[str, Any]]:
        """Return the sums of up to `limit` sagas with an id greater than `after`, ordered by id.

        Raises PartnerUnavailable.
        """
        return _field(await self._get("/ledger/summary", {"after": after, "limit": limit, **DETAILS}), "sagas")

    async def read_saga(self, saga_id: str) -> Mapping[str, Any] | None:
        """Return the sums of one saga; None if the ledger has no entry of it. Raises PartnerUnavailable."""
        return _field(await self._get("/ledger/summary", {"saga_id": saga_id, **DETAILS}), "sagas").get(saga_id)

    async def read_stock(self, after: str, limit: int) -> Mapping[str, Mapping[str, int]]:
        """Return the stock of up to `limit` items with an id greater than `after`. Raises PartnerUnavailable."""
        return _field(await self._get("/ledger/stock", {"after": after, "limit": limit}), "items")

    async def _get(self, path: str, query: Mapping[str, str | int]) -> Any | None:
        try:
            reply = await self._exchange(f"{path}?{urlencode(query)}")
            if reply.status in NO_LEDGER:
                return None
            _require_page(reply)
            return json.loads(reply.body)
        except (TimeoutError, NotConnected, Interrupted, ValueError) as error:
            reason = "no answer in time" if isinstance(error, TimeoutError) else type(error).__name__
            raise PartnerUnavailable(f"the ledger cannot be read: {reason}") from error

    async def _exchange(self, path: str) -> Reply:
        target = Target.parse(self.base_url)
        async with asyncio.timeout(self.timeout_seconds):
            return await self.http.exchange(
                target, target.request("GET", path, {}, None), self.timeout_seconds, MAX_PAGE_BYTES
            )


def _require_page(reply: Reply) -> None:
    if reply.status != HTTPStatus.OK:
        raise PartnerUnavailable(f"the ledger answered {reply.status}")
    if len(reply.body) > MAX_PAGE_BYTES:
        raise PartnerUnavailable("the ledger cannot be read: the page is too large")


def _field(body: Any, name: str) -> Mapping[str, Any]:
    """Return a field of an answer that must be an object of objects. Raises PartnerUnavailable."""
    found = body.get(name) if isinstance(body, dict) else None
    if not isinstance(found, dict):
        raise PartnerUnavailable(f"the ledger's answer has no {name}")
    return found
