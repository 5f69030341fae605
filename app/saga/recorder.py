"""The recorder writes what the running sagas of a process have done. Sagas that write at the same time share a batch.

- `save`: the progress from one call to the next. One statement, which locks no order.
- `change`: everything else. One transaction locks the orders, decides what to write now that no cancel can come in
  between, and writes sagas, orders and events.

Each saga keeps its own fencing: the rows of one that was claimed again, by another process or by this one, are left
out, and its runner gets StaleLease. A batch may have both runners of a saga. A saga whose row is refused, or whose
order another process has locked, is written alone after the batch.
"""

from collections.abc import Callable, Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass
from uuid import UUID

from app import db
from app.batcher import Alone, Batcher, BatcherConfig
from app.errors import StaleLease
from app.orders import store as order_store
from app.orders.model import Order
from app.orders.store import TracedOrder
from app.saga import store
from app.saga.store import Saga, SagaWrite


@dataclass(frozen=True, slots=True)
class Change:
    """The write of a saga, and the new versions of its order that belong to it."""

    write: SagaWrite
    versions: Sequence[TracedOrder] = ()


Decide = Callable[[Order], Change]  # runs while the order is locked, perhaps more than once: the last one counts


@dataclass(frozen=True, slots=True)
class _Request:
    saga_id: UUID
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

    async def change(self, saga_id: UUID, decide: Decide) -> Saga:
        """Lock the order of a saga, then write what `decide` returns. Raises StaleLease: then nothing was written."""
        request = _Request(saga_id, decide, copy_context())
        result = await self._changes.submit(request)
        if isinstance(result, Alone):
            async with db.transaction(self._pool) as conn:
                (result,) = await _change(conn, [request])
        return _require_ours(result, saga_id)

    async def _save_batch(self, writes: Sequence[SagaWrite]) -> Sequence[Saga | None]:
        async with db.connection(self._pool) as conn:
            return await _save(conn, writes)

    async def _change_batch(self, requests: Sequence[_Request]) -> Sequence[Saga | None]:
        async with db.batch_transaction(self._pool, len(requests)) as conn:
            return await _change(conn, requests)


async def _save(conn: db.Connection, writes: Sequence[SagaWrite]) -> Sequence[Saga | None]:
    """Return each saga as it is now, None for one that was claimed again."""
    saved = await store.save(conn, writes)
    return [saved.get(write.claim) for write in writes]


async def _change(conn: db.Connection, requests: Sequence[_Request]) -> Sequence[Saga | None]:
    """Return as `_save` does."""
    orders = await order_store.load_many(conn, [request.saga_id for request in requests], lock=True)
    changes = [request.context.run(request.decide, orders[request.saga_id]) for request in requests]
    saved = await store.save(conn, [change.write for change in changes])
    await order_store.update(
        conn, [version for change in changes if change.write.claim in saved for version in change.versions]
    )
    return [saved.get(change.write.claim) for change in changes]


def _require_ours(result: Saga | None, saga_id: UUID) -> Saga:
    if result is None:
        raise StaleLease(f"saga {saga_id} was taken over")
    return result
