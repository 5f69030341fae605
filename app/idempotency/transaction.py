"""Commit one write once: the key's row and the write's rows in one transaction, even if the outcome of COMMIT is lost.

    acquire the key → write → commit        or, if the key is taken:        read the stored response → replay it

Where the process or the connection may fail, and what happens then:

- before the commit: Postgres rolls back. There is neither key row nor effect, and the next attempt counts as the first;
- after the commit: the next attempt finds the row and gets the same bytes;
- between COMMIT and its answer: the outcome is *unknown*. The same transaction runs again with the same key and ids. If
  the first one committed, the key (or, without a key, the primary key of its rows) shows that. If it is still running,
  the index makes the second one wait. If it was rolled back, the second one counts as the first. If the outcome stays
  unknown, the caller gets DatabaseUnavailable, and can retry with the same key. A response is sent only for a commit.

`execute_batch` commits the writes of many requests in one transaction. It is for the usual case: new keys, good rows.
Whatever is not usual (a key that is taken or locked, a row that is refused, an unknown outcome) is left to `execute`,
one request at a time, so a request cannot harm its neighbours in the batch.

A row that is visible need not be on the synchronous standby yet (`db.await_standby`), so no replay trusts its eyes
alone: a taken key's row gets locked, which makes the COMMIT wait for the standby; the others wait explicitly.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import asyncpg
import structlog

from app import db
from app.batcher import Alone
from app.errors import DatabaseUnavailable, IdempotencyKeyReused, RequestInProgress
from app.idempotency import store
from app.idempotency.key import IdempotencyKey
from app.idempotency.store import KeyRecord, StoredResponse
from app.values import immutable

log = structlog.get_logger(__name__)

MAX_ATTEMPTS = 3  # the first, and two to find out its outcome; more would only keep the caller waiting

Row = TypeVar("Row")
Write = Callable[[db.Connection], Awaitable[StoredResponse]]
WriteRows = Callable[[db.Connection, Sequence[Row]], Awaitable[None]]


class AlreadyCommitted(Exception):
    """Raised by a write that finds its own rows, committed by an earlier attempt."""


@immutable
class Committed:
    """This attempt committed."""

    response: StoredResponse


@immutable
class KeyTaken:
    """The key already has a response."""

    record: KeyRecord


@immutable
class KeyExpired:
    """The key's row expired between two statements, so the key is free again."""


@dataclass(frozen=True, slots=True, eq=False)
class BatchEntry(Generic[Row]):
    """One request of a batch: its key, the row to write, and the response to store under the key."""

    key: IdempotencyKey | None
    row: Row
    response: StoredResponse


@immutable
class InDoubt:
    """The batch may have committed this request, with this response: `execute` has to find out."""

    response: StoredResponse


class _CommitUnknown(Exception):
    """COMMIT was sent, but not answered."""

    def __init__(self, response: StoredResponse) -> None:
        super().__init__("the outcome of COMMIT is unknown")
        self.response = response


async def execute(
    pool: db.Pool,
    key: IdempotencyKey | None,
    write: Write,
    response: StoredResponse | None,
    *,
    ttl_seconds: float,
    wait_seconds: float,
    in_doubt: StoredResponse | None = None,
) -> StoredResponse:
    """Run `write` in a transaction with its key, or replay the response of the key.

    `response`: what `write` will return, if that is known; else it is stored after `write` has returned it. `write` may
    run more than once and must write the same rows each time. `in_doubt`: what an earlier attempt may have committed.

    Raises IdempotencyKeyReused (the key stands for another request), RequestInProgress (the first request with the key
    is still running after `wait_seconds`), DatabaseUnavailable.
    """
    attempts = 0 if in_doubt is None else 1
    while True:
        attempts += 1
        try:
            outcome = await _attempt(pool, key, write, response, ttl_seconds, wait_seconds)
        except (_CommitUnknown, DatabaseUnavailable) as error:
            in_doubt = error.response if isinstance(error, _CommitUnknown) else in_doubt
            if in_doubt is None:
                raise
            if attempts == MAX_ATTEMPTS:
                raise DatabaseUnavailable("postgres: the outcome of COMMIT is unknown") from error
            log.warning("commit.unknown", error=str(error.__cause__ or error), runs=attempts)
            continue
        match outcome:
            case Committed(response=committed):
                return committed
            case KeyTaken(record=record):
                return _replayed(key, record, in_doubt)
            case KeyExpired():
                attempts -= 1


async def execute_batch(
    pool: db.Pool, write: WriteRows[Row], entries: Sequence[BatchEntry[Row]], *, ttl_seconds: float
) -> list[Committed | InDoubt | Alone]:
    """Commit all requests whose keys are free, in one transaction. No two of them have the same key.

    Raises DatabaseUnavailable, LocksTaken and what `write` raises, after which nothing is committed.
    """
    chosen: list[BatchEntry[Row]] = []
    is_written = False
    try:
        async with db.batch_transaction(pool, len(entries)) as conn:
            chosen = await _acquire_free(conn, entries, ttl_seconds)
            await write(conn, [entry.row for entry in chosen])
            is_written = True
    except DatabaseUnavailable as error:
        if not is_written:
            raise
        log.warning("commit.unknown", error=str(error.__cause__ or error), runs=1, requests=len(chosen))
        in_doubt = set(chosen)
        return [InDoubt(entry.response) if entry in in_doubt else Alone() for entry in entries]
    committed = set(chosen)
    return [
        Committed(_stored(entry.response, entry.key, ttl_seconds)) if entry in committed else Alone()
        for entry in entries
    ]


async def replay(pool: db.Pool, key: IdempotencyKey) -> StoredResponse | None:
    """Return the response that the key already has, None if it has none.

    Raises IdempotencyKeyReused, DatabaseUnavailable.
    """
    async with db.connection(pool) as conn:
        record = await store.find(conn, key.tenant, key.key)
        if record is not None:
            await db.await_standby(conn)
    return None if record is None else _replayed(key, record, in_doubt=None)


async def _attempt(
    pool: db.Pool,
    key: IdempotencyKey | None,
    write: Write,
    response: StoredResponse | None,
    ttl_seconds: float,
    wait_seconds: float,
) -> Committed | KeyTaken | KeyExpired:
    written: StoredResponse | None = None
    try:
        async with db.transaction(pool, lock_seconds=wait_seconds) as conn:
            if key is not None and not await _acquire(conn, key, response, ttl_seconds, wait_seconds):
                record = await store.find(conn, key.tenant, key.key)
                return KeyExpired() if record is None else KeyTaken(record)
            result = await write(conn)
            if key is not None and response is None:
                await store.complete(conn, key, result)
            written = _stored(result, key, ttl_seconds)
    except AlreadyCommitted:
        assert response is not None  # noqa: S101 - bug: only writes with a known response raise this
        async with db.connection(pool) as conn:
            await db.await_standby(conn)
        return Committed(response)
    except DatabaseUnavailable as error:
        if written is None:
            raise
        raise _CommitUnknown(written) from error
    return Committed(written)


async def _acquire_free(
    conn: db.Connection, entries: Sequence[BatchEntry[Row]], ttl_seconds: float
) -> list[BatchEntry[Row]]:
    """Acquire the keys that are free. Return the requests that have acquired theirs, or need none."""
    keyed = [(entry.key, entry.response) for entry in entries if entry.key is not None]
    acquired = await store.acquire_free(conn, keyed, ttl_seconds) if keyed else ()
    return [entry for entry in entries if entry.key is None or (entry.key.tenant, entry.key.key) in acquired]


async def _acquire(
    conn: db.Connection, key: IdempotencyKey, response: StoredResponse | None, ttl_seconds: float, wait_seconds: float
) -> bool:
    try:
        return await store.acquire(conn, key, response or store.PLACEHOLDER, ttl_seconds, wait_seconds)
    except asyncpg.LockNotAvailableError as error:
        raise RequestInProgress("the first request with this Idempotency-Key is still running") from error


def _stored(response: StoredResponse, key: IdempotencyKey | None, ttl_seconds: float) -> StoredResponse:
    return replace(response, remaining_seconds=0.0 if key is None else ttl_seconds)


def _replayed(key: IdempotencyKey | None, record: KeyRecord, in_doubt: StoredResponse | None) -> StoredResponse:
    """Return the stored response. It is no replay if this caller's own attempt committed it."""
    assert key is not None  # noqa: S101 - bug: only a key can be taken
    if (record.fingerprint_version, record.fingerprint) != (key.fingerprint_version, key.fingerprint):
        raise IdempotencyKeyReused("this Idempotency-Key was used for another request")
    return replace(record.response, replayed=in_doubt is None or in_doubt.body != record.response.body)
