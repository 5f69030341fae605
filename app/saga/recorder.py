"""The recorder writes what the running sagas of a process have done. Sagas that write at the same time share a batch.

- `save`: the progress from one call to the next. One statement, which locks no order.
- `change`: everything else. One transaction locks the orders, decides what to write now that neither a cancel nor
  another runner's change can come in between, and writes sagas, orders and events.

Each saga keeps its own fencing: the rows of one that was claimed again, by another process or by this one, are left
out, and its runner gets StaleLease. A batch may have both runners of a saga. A saga whose row is refused, or whose
order another process has locked, is written alone after the batch.
"""

from collections.abc import Callable, Sequence
from contextvars import Context, copy_context
from uuid import UUID

from app import db
from app.batcher import Alone, Batcher, BatcherConfig
from app.errors import StaleLease
from app.orders import store as order_store
from app.orders.model import Order
from app.orders.store import TracedOrder
from app.saga import store
from app.saga.store import Claim, Saga, SagaWrite
from app.values import immutable


@immutable
class Change:
    """The write of a saga, and the new versions of its order that belong to it."""

    write: SagaWrite
    versions: Sequence[TracedOrder] = ()


Decide = Callable[[Order], Change]  # runs while the order is locked, perhaps more than once: the last one counts


@immutable
class _Request:
    claim: Claim
    decide: Decide
    context: Context  # of the saga's run: its trace, and the fields of its log lines


class Recorder:
    """Writes to one pool of connections."""

    def __init__(self, pool: db.Pool) -> None:
        self._pool = pool
        self._saves: Batcher[SagaWrite, Saga | None] = Batcher(self._save_batch, BatcherConfig(db.BATCH_SIZE))
        self._changes: Batcher[_Request, Saga | None] = Batcher(self._change_batch, BatcherConfig(db.BATCH_SIZE))

    async def save(self, write: SagaWrite) -> Saga:
        """Write the progress of a saga. Return it as it is now. Raises StaleLease: then nothing was written."""
        result = await self._saves.submit(write)
        if isinstance(result, Alone):
            async with db.connection(self._pool) as conn:
                (result,) = await _save(conn, [write])
        return _require_ours(result, write.saga.id)

    async def change(self, saga: Saga, decide: Decide) -> Saga:
        """Lock the order of a saga, then write what `decide` returns. Raises StaleLease: then nothing was written."""
        request = _Request(saga.claim, decide, copy_context())
        result = await self._changes.submit(request)
        if isinstance(result, Alone):
            async with db.transaction(self._pool) as conn:
                (result,) = await _change(conn, [request])
        return _require_ours(result, saga.id)

    async def _save_batch(self, writes: Sequence[SagaWrite]) -> Sequence[Saga | None]:
        async with db.connection(self._pool) as conn:
            with db.giving_way():
                return await _save(conn, writes, db.BATCH_LOCKS_SECONDS / len(writes))

    async def _change_batch(self, requests: Sequence[_Request]) -> Sequence[Saga | None]:
        async with db.batch_transaction(self._pool, len(requests)) as conn:
            return await _change(conn, requests)


async def _save(
    conn: db.Connection, writes: Sequence[SagaWrite], lock_seconds: float | None = None
) -> Sequence[Saga | None]:
    """Return each saga as it is now, None for one that was claimed again."""
    saved = await store.save(conn, writes, lock_seconds)
    return [saved.get(write.claim) for write in writes]


async def _change(conn: db.Connection, requests: Sequence[_Request]) -> Sequence[Saga | None]:
    """Return as `_save` does."""
    saga_ids = [saga_id for saga_id, _ in (request.claim for request in requests)]
    orders = await order_store.load_many(conn, saga_ids, lock=True)
    claims = await store.find_claims(conn, saga_ids)  # what a runner decides that was superseded is not to be trusted
    changes = [
        request.context.run(request.decide, orders[request.claim[0]]) for request in requests if request.claim in claims
    ]
    saved = await store.save(conn, [change.write for change in changes])
    await order_store.update(
        conn, [version for change in changes if change.write.claim in saved for version in change.versions]
    )
    return [saved.get(request.claim) for request in requests]


def _require_ours(result: Saga | None, saga_id: UUID) -> Saga:
    if result is None:
        raise StaleLease(f"saga {saga_id} was taken over")
    return result
