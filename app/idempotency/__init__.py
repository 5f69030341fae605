"""Idempotent writes: one key stands for one write, whose response is stored with it and replayed.

    replay memory → replay cache (Redis) → single flight → batch → one transaction: key rows, the writes' rows → commit

Postgres decides. The key's row holds the response and commits together with the rows of the request, so key, effect and
response exist together or not at all (`transaction`). Everything before it only saves load on Postgres:

- the replay memory of this process answers a request that repeats an earlier one byte for byte, before it is parsed;
- the replay cache holds copies of finished responses. A copy is used only if it names exactly this request; otherwise
  Postgres is asked. If Redis is lost, flushed, frozen or restored, only speed changes;
- single flight lets one request per key and process through; the others share its response;
- a batch commits what comes while the last one commits (`app.batcher`). A request that is not usual runs alone after
  it: `execute_batch` says which;
- the concurrency limit admits as many transactions as there are connections. One is left to the batches.

A process may die at any point. Before the commit there is neither key row nor effect, and the retry counts as the first
request; after it, the retry finds the row and gets the same bytes.
"""

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from app import db
from app.batcher import Alone, Batcher, BatcherConfig
from app.cache import Cache
from app.errors import IdempotencyKeyNotFound, IdempotencyKeyReused, OutboxFull, RequestInProgress
from app.idempotency import replay_cache, store, transaction
from app.idempotency.concurrency_limit import ConcurrencyLimit
from app.idempotency.facts import Conflict, KeyConflicted, ResponseReplayed, Source
from app.idempotency.key import IdempotencyKey
from app.idempotency.single_flight import SingleFlight
from app.idempotency.store import KeyRecord, StoredResponse
from app.idempotency.transaction import BatchEntry, Committed, InDoubt, Row, Write, WriteRows
from app.observability.signals import Signals
from app.values import immutable

Execute = Callable[[float], Awaitable[StoredResponse]]  # within so many seconds


@immutable
class IdempotencyConfig:
    """`ttl_seconds`: how long a key stands for its response. `wait_seconds`: how long a request waits for another."""

    ttl_seconds: float
    wait_seconds: float
    concurrency: int


def _admit() -> None:
    """Admit every write."""


class Idempotency:
    """Runs writes, each at most once for its key. Without a key, a write simply runs."""

    def __init__(self, pool: db.Pool, cache: Cache | None, config: IdempotencyConfig, signals: Signals) -> None:
        self._pool = pool
        self._cache = cache
        self._config = config
        self._signals = signals
        self._limit = ConcurrencyLimit(config.concurrency)
        self._alone_limit = ConcurrencyLimit(max(1, config.concurrency - 1))
        self._single_flight = SingleFlight()
        self._batchers: dict[WriteRows[Any], Batcher[BatchEntry[Any], Committed | InDoubt]] = {}

    async def run(
        self,
        key: IdempotencyKey | None,
        write: WriteRows[Row],
        make: Callable[[], tuple[Row, StoredResponse]],
        admit: Callable[[], None] = _admit,
    ) -> StoredResponse:
        """Write a row and store its response under the key, or return the response that the key already has.

        `make` returns both. It is called once, before the transaction, and not for a replay, which would take a fifth
        longer. So `write` is a function of rows that may run again with the same ones; it raises AlreadyCommitted if it
        finds them written. `admit` may raise OutboxFull to refuse a new write.

        Raises IdempotencyKeyReused (the key stands for another request), RequestInProgress (the first request with the
        key is still running), OutboxFull, Overloaded, DatabaseUnavailable.
        """

        async def execute(wait_seconds: float) -> StoredResponse:
            try:
                admit()
            except OutboxFull:
                if key is None or (stored := await transaction.replay(self._pool, key)) is None:
                    raise
                return stored  # a replay writes nothing
            row, response = make()
            deadline = time.monotonic() + wait_seconds
            outcome = await self._batcher(write).submit(BatchEntry(key, row, response))
            if isinstance(outcome, Committed):
                return outcome.response

            async def write_row(conn: db.Connection) -> StoredResponse:
                await write(conn, [row])
                return response

            in_doubt = outcome.response if isinstance(outcome, InDoubt) else None
            return await self._execute_alone(key, write_row, response, in_doubt, deadline - time.monotonic())

        return await self._run(key, execute)

    async def run_single(self, key: IdempotencyKey | None, write: Write) -> StoredResponse:
        """Run a write that makes its response inside its transaction. Raises as `run` does, and what `write` raises."""
        return await self._run(key, partial(self._execute_alone, key, write, None, None))

    async def find(self, tenant: str, key: str) -> KeyRecord:
        """Return the row of a key. Raises IdempotencyKeyNotFound, also for an expired or another tenant's key."""
        async with db.connection(self._pool) as conn:
            record = await store.find(conn, tenant, key)
        if record is None:
            raise IdempotencyKeyNotFound("no finished write has this key; one that is still running may")
        return record

    async def _run(self, key: IdempotencyKey | None, execute: Execute) -> StoredResponse:
        if key is None:
            return await execute(self._config.wait_seconds)
        if copy := await self._read_copy(key):
            self._signals.emit(ResponseReplayed(Source.REDIS))
            # The time to its expiry is on the clock of the process that wrote it: the replay memory must not keep it.
            return replace(copy, remaining_seconds=0.0)
        try:
            result = await self._run_first(key, execute)
        except (IdempotencyKeyReused, RequestInProgress) as error:
            is_reused = isinstance(error, IdempotencyKeyReused)
            self._signals.emit(KeyConflicted(Conflict.REUSED if is_reused else Conflict.IN_PROGRESS))
            raise
        if result.replayed:
            self._signals.emit(ResponseReplayed(Source.POSTGRES))
        return result

    async def _run_first(self, key: IdempotencyKey, execute: Execute) -> StoredResponse:
        """Run while no other request of this key runs in this process; share the result of the one before."""
        deadline = time.monotonic() + self._config.wait_seconds
        inflight = await self._single_flight.join(key, self._config.wait_seconds)
        try:
            if inflight.result is not None and inflight.result[0] == key:
                return replace(inflight.result[1], replayed=True)
            started_at = time.monotonic()
            result = await execute(deadline - started_at)
            inflight.result = (key, result)
            self._leave_copy(key, result, result.remaining_seconds - (time.monotonic() - started_at))
            return result
        finally:
            inflight.leave()

    async def _execute_alone(
        self,
        key: IdempotencyKey | None,
        write: Write,
        response: StoredResponse | None,
        in_doubt: StoredResponse | None,
        wait_seconds: float,
    ) -> StoredResponse:
        deadline, ttl_seconds = time.monotonic() + wait_seconds, self._config.ttl_seconds
        async with self._alone_limit.slot(wait_seconds), self._limit.slot(deadline - time.monotonic()):
            remaining_seconds = deadline - time.monotonic()
            return await transaction.execute(
                self._pool,
                key,
                write,
                response,
                ttl_seconds=ttl_seconds,
                wait_seconds=remaining_seconds,
                in_doubt=in_doubt,
            )

    def _batcher(self, write: WriteRows[Row]) -> Batcher[BatchEntry[Row], Committed | InDoubt]:
        """Return the batcher of this write."""
        if write not in self._batchers:
            self._batchers[write] = Batcher(partial(self._execute_batch, write), BatcherConfig(db.BATCH_SIZE))
        return self._batchers[write]

    async def _execute_batch(
        self, write: WriteRows[Row], entries: Sequence[BatchEntry[Row]]
    ) -> list[Committed | InDoubt | Alone]:
        async with self._limit.slot(self._config.wait_seconds):
            return await transaction.execute_batch(self._pool, write, entries, ttl_seconds=self._config.ttl_seconds)

    async def _read_copy(self, key: IdempotencyKey) -> StoredResponse | None:
        raw = None if self._cache is None else await self._cache.get(replay_cache.name(key))
        return None if raw is None else replay_cache.decode(key, raw, time.time())

    def _leave_copy(self, key: IdempotencyKey, response: StoredResponse, remaining_seconds: float) -> None:
        """Copy a committed response to Redis. The copy must expire no later than the key's row in Postgres."""
        if self._cache is not None:
            value = replay_cache.encode(key, response, time.time() + remaining_seconds)
            self._cache.put(replay_cache.name(key), value, remaining_seconds)
