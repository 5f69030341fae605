"""One write, once: the key's row and what it stands for in one transaction, whatever happens to its COMMIT.

    take the key → act → commit        or, where the key is taken:    find the stored answer → replay it

Where it may die:

- before the commit: Postgres rolls back, neither row nor effect are there, the next try is the first;
- after it: the next try finds the row and gets the same bytes;
- while the commit's answer is on its way: *unknown*. The same transaction runs again, with the same key and the same
  ids. If the first one committed, the key (or, without a key, the primary key of what it wrote) says so; if it is still
  in doubt, the index makes this one wait for it; if it was lost, this one is the first. When even that cannot be found
  out now, the caller gets DatabaseUnavailable, and the same key tells later. Never an answer for what is not committed.
"""

from collections.abc import Awaitable, Callable
from dataclasses import replace

import asyncpg
import structlog

from app import db
from app.errors import DatabaseUnavailable, IdempotencyKeyReused, RequestInProgress
from app.idempotency import store
from app.idempotency.store import Answer, Key

log = structlog.get_logger(__name__)

MAX_RUNS = 3  # the first, and two to find out what became of it; more would only keep the caller waiting

Act = Callable[[db.Connection], Awaitable[Answer]]


class AlreadyDone(Exception):
    """Raised by an act that finds its own effect committed by an earlier run of it."""

    def __init__(self, answer: Answer) -> None:
        super().__init__("an earlier run was committed")
        self.answer = answer


async def once(
    pool: db.Pool,
    key: Key | None,
    act: Act,
    *,
    ttl_seconds: float,
    wait_seconds: float,
    foretold: Answer | None = None,
) -> Answer:
    """Run `act` in a transaction with its key, or replay what the key stands for. `foretold`: the answer, if known.

    `act` may run more than once and must write the same each time. Raises IdempotencyKeyReused (the key stands for
    another request), RequestInProgress (the first one is still running after `wait_seconds`), DatabaseUnavailable.
    """
    runs = 0
    ours: Answer | None = None  # what we sent a COMMIT for, whatever became of it
    while True:
        runs += 1
        try:
            async with db.transaction(pool, lock_seconds=wait_seconds) as conn:
                free = key is None or await _take(conn, key, foretold, ttl_seconds, wait_seconds)
                stored = None if key is None or free else await store.find(conn, key.tenant, key.key)
                if free:
                    answer = await act(conn)
                    if key is not None and foretold is None:
                        await store.set_answer(conn, key, answer)
                    ours = replace(answer, remaining_seconds=ttl_seconds if key else 0.0)
        except AlreadyDone as done:
            return done.answer
        except DatabaseUnavailable as error:
            if ours is None or runs == MAX_RUNS:
                raise
            log.warning("commit.unknown", error=str(error), runs=runs)
            continue
        if free and ours is not None:
            return ours
        if key is not None and stored is not None:
            return _replay(key, stored, ours)
        # The row was there and is gone: it expired between the two statements, so the key is free again.
        runs -= 1


async def replay(pool: db.Pool, key: Key) -> Answer | None:
    """Return the answer that the key already has, None if it has none.

    Raises IdempotencyKeyReused, DatabaseUnavailable.
    """
    async with db.connection(pool) as conn:
        stored = await store.find(conn, key.tenant, key.key)
    return None if stored is None else _replay(key, stored, ours=None)


async def _take(
    conn: db.Connection, key: Key, foretold: Answer | None, ttl_seconds: float, wait_seconds: float
) -> bool:
    try:
        return await store.take(conn, key, foretold or store.NOT_YET, ttl_seconds, wait_seconds)
    except asyncpg.LockNotAvailableError as error:
        raise RequestInProgress("the first request with this Idempotency-Key is still running") from error


def _replay(key: Key, stored: store.Stored, ours: Answer | None) -> Answer:
    """Return the stored answer; to the caller whose own run committed it, it is the first and no replay."""
    if (stored.fingerprint_version, stored.fingerprint) != (key.fingerprint_version, key.fingerprint):
        raise IdempotencyKeyReused("this Idempotency-Key was used for another request")
    return replace(stored.answer, replayed=ours is None or ours.body != stored.answer.body)
