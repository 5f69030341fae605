"""Measure the cost of statements, as Postgres counts it."""

import json
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from app import db

Plan = dict[str, Any]
TABLES = ("orders", "outbox", "inbox", "sagas", "idempotency_keys")


async def plans_of(pool: db.Pool, act: Callable[[db.Connection], Awaitable[Any]]) -> list[Plan]:
    """Return the executed plan of each statement that `act` runs, in order. Rolls everything back."""
    queries: list[tuple[str, tuple[Any, ...]]] = []

    def keep(query: Any) -> None:
        if any(table in query.query for table in TABLES):
            queries.append((query.query, query.args))

    async with pool.acquire() as conn:
        with conn.query_logger(keep):
            await _undone(conn, act)
        found: list[Plan] = []

        async def explain(conn: db.Connection) -> None:
            for query, values in queries:
                text = await conn.fetchval(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {query}", *values)
                found.append(json.loads(text)[0]["Plan"])

        await _undone(conn, explain)
    return found


async def _undone(conn: db.Connection, act: Callable[[db.Connection], Awaitable[Any]]) -> None:
    transaction = conn.transaction()
    await transaction.start()
    try:
        await act(conn)
    finally:
        await transaction.rollback()


def buffers(plans: list[Plan]) -> int:
    """Return how many pages the statements touched, in memory or not."""
    return sum(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] for plan in plans)


def full_scans(plans: list[Plan]) -> set[str]:
    """Return the tables that are read from end to end."""
    return {node["Relation Name"] for plan in plans for node in _nodes(plan) if node["Node Type"] == "Seq Scan"}


def indexes(plans: list[Plan]) -> set[str]:
    """Return the indexes that are used."""
    return {node["Index Name"] for plan in plans for node in _nodes(plan) if "Index Name" in node}


def _nodes(plan: Plan) -> Iterator[Plan]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from _nodes(child)
