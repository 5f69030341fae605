"""Make rows of every table older than the limit of their state, and younger again."""

from uuid import UUID

from app.db import Pool
from app.operations.ages import AgeLimit
from tests.harness.orders import placed, start_saga

# By (table, state): what puts the rows of order $1 into the state, $2 seconds ago.
PLACED = {
    ("outbox", "waiting"): "UPDATE outbox SET pending_since = {ago} WHERE subject = $1::text",
    ("outbox", "claimed"): (
        "UPDATE outbox SET claim_token = gen_random_uuid(), next_attempt_at = {ago} + interval '30 s'"
        " WHERE subject = $1::text"
    ),
    ("outbox", "parked"): "UPDATE outbox SET parked_at = {ago} WHERE subject = $1::text",
    ("orders", "without a saga"): "UPDATE outbox SET pending_since = {ago} WHERE subject = $1::text",
    ("inbox", "failing"): (
        "INSERT INTO inbox (consumer, message_id, attempts, first_failure_at, last_failure_at)"
        " SELECT 'saga', id, 1, {ago}, {ago} FROM outbox WHERE subject = $1::text"
    ),
    ("inbox", "dead letter"): (
        "INSERT INTO inbox (consumer, message_id, attempts, dead_at)"
        " SELECT 'saga', id, 7, {ago} FROM outbox WHERE subject = $1::text"
    ),
}
STARTED = {
    ("sagas", "due"): "UPDATE sagas SET next_attempt_at = {ago} WHERE id = $1::uuid",
    ("sagas", "late"): (
        "UPDATE sagas SET deadline_at = {ago}, next_attempt_at = clock_timestamp() + interval '1 day'"
        " WHERE id = $1::uuid"
    ),
    ("sagas", "undo fails"): (
        "UPDATE sagas SET direction = 'backward', needs_operator_at = {ago} + interval '300 s' WHERE id = $1::uuid"
    ),
    ("sagas", "needs an operator"): "UPDATE sagas SET needs_operator_at = {ago} WHERE id = $1::uuid",
}
OTHER = {
    ("idempotency_keys", "expired"): (
        "INSERT INTO idempotency_keys (tenant, key, fingerprint, fingerprint_version, status, location, body,"
        " created_at, expires_at) SELECT 'default', $1, '', 1, 201, '', '', {ago}, {ago}"
    ),
    ("transport_leases", "expired"): (
        "INSERT INTO transport_leases (id, transport, holder, expires_at) SELECT $1::uuid, 'rabbitmq', 'gone', {ago}"
    ),
    ("operator_actions", "unfinished"): (
        "INSERT INTO operator_actions (at, actor, action, order_id, reason, outcome)"
        " SELECT {ago}, 'cli:ada', 'dlq replay', $1::uuid, '', 'unfinished'"
    ),
}


async def put_row(pool: Pool, limit: AgeLimit, seconds: float) -> UUID:
    """Put a row of a new order into this state since `seconds`. Return the order."""
    place = (limit.table, limit.state)
    order_id = await start_saga(pool) if place in STARTED else (await placed(pool)).id
    statement = (PLACED | STARTED | OTHER)[place]
    since = f"(clock_timestamp() - interval '{seconds:g} s')"
    await pool.execute(statement.format(ago=since), str(order_id))
    return order_id
