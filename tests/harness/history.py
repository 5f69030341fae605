"""Insert years of history at once: thousands of rows like those that the service leaves."""

# Ids like those of uuid7(): the time in milliseconds, then a number instead of random bits.
from asyncpg import Pool

AN_ID = """
    CREATE OR REPLACE FUNCTION pg_temp.an_id(at timestamptz, n bigint) RETURNS uuid LANGUAGE sql IMMUTABLE AS $$
        SELECT (lpad(to_hex((extract(epoch FROM at) * 1000)::bigint), 12, '0') || '7' || lpad(to_hex(n >> 60), 3, '0')
                || '8' || lpad(to_hex(n), 15, '0'))::uuid
    $$
"""

ORDERS = """
    INSERT INTO orders (id, tenant, status, currency, total_minor, version, placed_at, updated_at)
    SELECT pg_temp.an_id(at, n), 'default', $3, 'USD', 2997, 1, at, at
    FROM generate_series(1, $1) AS n,
         LATERAL (SELECT clock_timestamp() - $2::text::interval + n * interval '1 ms' AS at) AS placed
    RETURNING id
"""

EVENTS = """
    INSERT INTO outbox (id, type, subject, sequence, tenant, data, occurred_at, next_attempt_at, published_at)
    SELECT id, 'orders.order.placed.v1', id, 1, tenant, '{}', placed_at, placed_at, placed_at
    FROM orders WHERE id = ANY($1)
"""

INBOX = (
    "INSERT INTO inbox (consumer, message_id, processed_at) SELECT 'saga', id, placed_at FROM orders WHERE id = ANY($1)"
)

SAGAS = """
    INSERT INTO sagas (id, plan_version, direction, attempts, version, next_attempt_at, deadline_at, started_at,
                       updated_at, finished_at)
    SELECT id, 1, 'forward', 0, 9, placed_at, placed_at, placed_at, placed_at, placed_at
    FROM orders WHERE id = ANY($1)
"""

STEPS = """
    INSERT INTO saga_steps (saga_id, step, action, attempt, outcome)
    SELECT id, 'charge_payment', 'do', 1, outcome
    FROM unnest($1::uuid[]) AS id, unnest('{attempted,done}'::text[]) AS outcome
"""


async def lived_through(pool: Pool, orders: int, age: str, status: str = "confirmed") -> None:
    """Leave behind what `orders` orders do that were placed `age` ago: events, inbox rows, sagas with their log."""
    async with pool.acquire() as conn, conn.transaction():
        await conn.execute(AN_ID)
        ids = [row["id"] for row in await conn.fetch(ORDERS, orders, age, status)]
        for statement in (EVENTS, INBOX, SAGAS, STEPS):
            await conn.execute(statement, ids)


async def rows(pool: Pool) -> dict[str, int]:
    """Count what there is, by table."""
    tables = ("orders", "outbox", "inbox", "sagas", "saga_steps", "idempotency_keys")
    return {table: await pool.fetchval(f"SELECT count(*) FROM {table}") for table in tables}  # noqa: S608 - constants
