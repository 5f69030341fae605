"""Check the idempotency keys: I2 (one order per key), and what they say about I1, I5 and I9.

A key's row was written in the transaction of its order, with the response in it. So the response must be that of the
order that it names, and no second key may have placed the same order.
"""

import json
import re
from collections.abc import AsyncIterator, Iterator
from datetime import datetime
from http import HTTPStatus
from typing import Any

from app import db
from app.operations.verify.findings import Invariant, Suspicion
from app.orders.model import Status, rfc3339

LOCATION = r"^/orders/([0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12})$"
CANCEL_ACCEPTED = frozenset({HTTPStatus.OK, HTTPStatus.ACCEPTED})
FIRST = ("", "")

WITH_ORDERS = """
WITH page AS MATERIALIZED (
    SELECT tenant, key, status, location, body, expires_at FROM idempotency_keys {selected}
)
SELECT page.*, orders.id, orders.tenant AS order_tenant, orders.status AS order_status, orders.currency,
       orders.customer_id, orders.placed_at
FROM page LEFT JOIN orders ON orders.id = substring(page.location FROM '{location}')::uuid
ORDER BY page.tenant, page.key
"""
BY_KEY = "WHERE (tenant, key) > ($1, $2) ORDER BY tenant, key LIMIT $3"
# Keys expire in the order of their first use, and there is an index on that. A reader of new keys starts an hour back.
BY_EXPIRY = """
    WHERE expires_at > coalesce($1, (SELECT max(expires_at) FROM idempotency_keys) - interval '1 hour')
    ORDER BY expires_at LIMIT $2
"""
PAGE = WITH_ORDERS.format(selected=BY_KEY, location=LOCATION)
NEXT = WITH_ORDERS.format(selected=BY_EXPIRY, location=LOCATION)

# One sort or hash in Postgres, which spills to disk; no index leads from an order to its key.
SHARED = """
SELECT location, count(*) AS keys FROM idempotency_keys WHERE status = 201
GROUP BY location HAVING count(*) > 1 LIMIT $1
"""


async def walk(pool: db.Pool, limit: int) -> AsyncIterator[tuple[int, list[Suspicion]]]:
    """Yield for each page of keys how many they are, and what is wrong with them."""
    after = FIRST
    while True:
        async with db.connection(pool) as conn:
            rows = await conn.fetch(PAGE, *after, limit)
        yield len(rows), [suspicion for row in rows for suspicion in judge(row)]
        if len(rows) < limit:
            return
        after = rows[-1]["tenant"], rows[-1]["key"]


async def read_next(pool: db.Pool, after: datetime | None, limit: int) -> tuple[int, list[Suspicion], datetime | None]:
    """Return how many of the next keys there are, what is wrong with them, and where to continue.

    `after`: the expiry of the last key that was read; None: start with those of the last hour. If a key is wrong, the
    caller continues with the same keys, so that the violation stays visible until it is gone.
    """
    async with db.connection(pool) as conn:
        rows = await conn.fetch(NEXT, after, limit)
    suspicions = [suspicion for row in rows for suspicion in judge(row)]
    last = max((row["expires_at"] for row in rows), default=after)
    return len(rows), suspicions, after if suspicions else last


async def find_shared(pool: db.Pool, limit: int) -> list[Suspicion]:
    """Return orders that more than one key has placed."""
    async with db.connection(pool) as conn:
        rows = await conn.fetch(SHARED, limit)
    return [
        Suspicion(Invariant.I2, row["location"].rpartition("/")[2], f"{row['keys']} keys say that they placed it")
        for row in rows
    ]


def judge(row: Any) -> Iterator[Suspicion]:
    """Judge one key with the order that its location names."""
    match = re.fullmatch(LOCATION, row["location"])
    subject = match[1] if match else row["location"]
    if row["id"] is None:
        yield Suspicion(Invariant.I1, subject, "a key holds a response about it, and there is no such order")
        return
    if row["tenant"] != row["order_tenant"]:
        problem = f"it is of tenant {row['order_tenant']}, and a key of {row['tenant']} names it"
        yield Suspicion(Invariant.I9, subject, problem)
    if wrong := _find_differences(row):
        yield Suspicion(Invariant.I2, subject, f"a key names it with the response of another order: {', '.join(wrong)}")
    if row["status"] in CANCEL_ACCEPTED and row["order_status"] == Status.CONFIRMED:
        yield Suspicion(Invariant.I5, subject, "it is confirmed although a key holds the 2xx of its cancel")


def _find_differences(row: Any) -> list[str]:
    """Return the fields of the stored response that differ from the order, of those that never change."""
    try:
        body = json.loads(row["body"])
    except ValueError:
        return ["unreadable"]
    if not isinstance(body, dict):
        return ["unreadable"]
    expected = {
        "id": str(row["id"]),
        "customer_id": row["customer_id"],
        "currency": row["currency"],
        "placed_at": rfc3339(row["placed_at"]),
    }
    return [name for name, value in expected.items() if body.get(name) != value]
